"""The page about the architecture: every folder, the imports as they are, and a reading path that stays short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import ROOT, sections_of

PAGE = ROOT / "docs" / "explanation" / "architecture.md"
PACKAGE = ROOT / "lorakit"
FOLDERS = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")} - {"."}


def described_folders() -> dict[str, tuple[str, set[str]]]:
    """What the page's table says of each folder: what is in it, and what it imports."""
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {folder: (text, set(imported.split(", ")) - {""}) for folder, text, imported in rows}


def imported_folders(node: ast.AST) -> Iterator[str]:
    """The folders of `lorakit/` that a syntax tree imports from, anywhere but under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.module and child.module.startswith("lorakit."):
            yield child.module.split(".")[1]
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield from imported_folders(child)


def test_every_folder_has_its_line() -> None:
    """Each folder of `lorakit/` that has code is in the table, in one line that says something."""
    described = described_folders()
    assert described.keys() == FOLDERS
    assert [folder for folder, (text, _) in described.items() if not 8 < len(text) < 160] == []


def test_imports_are_those_of_the_code() -> None:
    """The table has what the files of each folder import, found by another way than the generator's."""
    described = described_folders()
    tops = {folder for folder in FOLDERS if "/" not in folder}
    assert {folder for folder, (_, imported) in described.items() if imported} <= tops
    for folder in tops:
        found = set()
        for file in (PACKAGE / folder).rglob("*.py"):
            found |= set(imported_folders(ast.parse(file.read_text(encoding="utf-8"))))
        assert described[folder][1] == (found & tops) - {folder, "utils"}, folder


def test_the_arrows_lead_to_everything_that_is_imported() -> None:
    """The diagram has each import of the table, directly or by way of others, and has no circle."""
    arrows: dict[str, set[str]] = {}
    for importer, imported in re.findall(r"^    (\w+) --> (\w+)$", PAGE.read_text(encoding="utf-8"), re.M):
        arrows.setdefault(importer, set()).add(imported)

    def below(folder: str) -> set[str]:
        return set().union(*({other} | below(other) for other in arrows.get(folder, ())))

    for folder, (_, imported) in described_folders().items():
        assert imported <= below(folder)
        assert folder not in below(folder)


def test_the_reading_path_can_be_read_in_an_evening() -> None:
    """At most 15 files and 2,500 lines, all of them there."""
    section = sections_of(PAGE.read_text(encoding="utf-8"), "##")["From the command line to the saved file"]
    files = re.findall(r"^\d+\. `(lorakit/[\w/]+\.py)`: ", section, re.M)
    lengths = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    assert 10 <= len(files) <= 15
    assert sum(lengths.values()) <= 2500, lengths


def test_places_exist() -> None:
    """Every file and folder that the page says something is in exists."""
    section = sections_of(PAGE.read_text(encoding="utf-8"), "##")["Where is …"]
    places = [
        place for cell in re.findall(r"\| ([^|]*) \|$", section, re.M) for place in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(places) > 30
    assert [place for place in places if not Path(PACKAGE / place).exists()] == []
