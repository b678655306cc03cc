"""The pages of the documentation, and what is found in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parents[2]

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")])
"""All that is written for people: the pages in `docs`, and those in the top folder and of plugins."""

_BLOCK = re.compile(r"(?:<!-- (?P<mark>\w+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@frozen
class Block:
    """A fenced block of a page."""

    page: Path
    mark: str
    """The word of the HTML comment in front of it; empty where there is none."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text[:60]!r}"


def blocks(language: str) -> list[Block]:
    """All blocks in a language."""
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, match["mark"] or "", match["language"], match["text"]) for match in found]


def links_of(page: Path) -> Iterator[str]:
    """The targets of a page's links to other files and to headings."""
    for target in _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors_of(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sections_of(text: str, level: str) -> dict[str, str]:
    """The text below each heading of a level, `##`, by heading; what stands before the first under ``""``."""
    before, *parts = re.split(rf"^{level} ", text, flags=re.M)
    return {"": before} | {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}
