"""Contact sheets: the previews of a run side by side, a row for each prompt and a column for each time of drawing."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.utils.atomic_io import write_atomically
from lorakit.utils.sheets import font_for, scaled_to_side, wrap_to_width

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorakit.utils.sheets import AnyFont

MAX_ROWS, MAX_COLUMNS = 16, 8
"""How many prompts and how many times of drawing a sheet shows at most."""
_CELL = 160
"""Pixels along the longer side of an image on the sheet."""
_GAP, _LABEL = 8, 180
"""Pixels between images, and for the prompts on the left."""
_TEXT_SIZE = 14
_LINES = _CELL // (_TEXT_SIZE + 4)
"""Lines of a prompt that are as high as an image."""
_NAME = re.compile(r"_(?P<prompt>\d{2,})_(?P<time>\d{14})(?:_\d+)?\.png$")


@frozen(order=True)
class Preview:
    """A preview's place on the sheet; the later of two at one place counts."""

    step: int
    """Training steps before it was drawn."""
    prompt: int
    """The prompt's place in the file, from 0."""
    time: str
    path: Path


def find_previews(paths: Iterable[Path], last_step: int) -> list[Preview]:
    """Which of these files are previews that were drawn up to a step; says nothing of others."""
    from PIL import Image

    found = []
    for path in paths:
        name = _NAME.search(path.name)
        if not name:
            continue
        with suppress(OSError), Image.open(path) as picture:
            step = picture.info.get("training_step", "")
            if step.isdecimal() and int(step) <= last_step:
                found.append(Preview(int(step), int(name["prompt"]), name["time"], path))
    return found


def write_contact_sheet(path: Path, previews: Iterable[Preview]) -> None:
    """Write a sheet of previews as PNG, whole or not at all. Raises OutputError.

    Of many times, the first and the last are shown, and others evenly between. Images that are gone are left out.
    """
    places = {(preview.prompt, preview.step): preview.path for preview in sorted(previews) if preview.path.is_file()}
    steps = sorted({step for _, step in places})
    if len(steps) > MAX_COLUMNS:
        steps = [steps[index * (len(steps) - 1) // (MAX_COLUMNS - 1)] for index in range(MAX_COLUMNS)]
    prompts = sorted({prompt for prompt, _ in places})[:MAX_ROWS]
    titles = [f"step {step}" if step else "before training" for step in steps]
    columns = [[places.get((prompt, step)) for prompt in prompts] for step in steps]
    _write(path, _sheet(titles, columns))


def write_sheet(path: Path, columns: Mapping[str, Sequence[Path]], *, whole: bool = False) -> None:
    """Write a sheet with a column of pictures under each title, whole or not at all. Raises OutputError.

    Unless it shall be `whole`, the first rows and columns are shown of many. Images that are gone are left out.
    """
    titles = [*columns][: None if whole else MAX_COLUMNS]
    height = max(map(len, columns.values()))
    height = height if whole else min(height, MAX_ROWS)
    padded = [[*columns[title], *[None] * height][:height] for title in titles]
    _write(path, _sheet(titles, [[own if own and own.is_file() else None for own in column] for column in padded]))


def _write(path: Path, sheet: Image) -> None:
    content = io.BytesIO()
    sheet.save(content, "PNG")
    write_atomically(path, content.getvalue())


def _sheet(titles: Sequence[str], columns: Sequence[Sequence[Path | None]]) -> Image:
    """The pictures of each column, from top to bottom, with the prompt of each row on the left."""
    from PIL import Image, ImageDraw

    pitch = _CELL + _GAP
    rows = [[path for path in paths if path is not None] for paths in zip(*columns, strict=True)]
    prompts = [_thumbnail(shown[-1])[1] if shown else "" for shown in rows]
    font = font_for("".join([*titles, *prompts]), _TEXT_SIZE)
    titles = [_fitted(title, font) for title in titles]
    head = _GAP + (_TEXT_SIZE + 10) * max((title.count("\n") + 1 for title in titles), default=1)
    size = (_LABEL + pitch * len(columns) + _GAP, head + pitch * max(map(len, columns), default=0) + _GAP)
    paper = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(paper)
    draw.font = font
    for column, (title, paths) in enumerate(zip(titles, columns, strict=True)):
        left = _LABEL + pitch * column + _GAP
        draw.multiline_text((left, _GAP), title, fill="black")
        for row, path in enumerate(paths):
            if path is None:
                continue
            top = head + pitch * row
            picture, _ = _thumbnail(path)
            paper.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
    for row, prompt in enumerate(prompts):
        text = wrap_to_width(draw, prompt, _LABEL - _GAP, _LINES)
        draw.multiline_text((_GAP, head + pitch * row), text, fill="black")
    return paper


@lru_cache(maxsize=MAX_ROWS * MAX_COLUMNS)
def _thumbnail(path: Path) -> tuple[Image, str]:
    """A preview as large as its place on the sheet, and its prompt."""
    from PIL import Image

    with Image.open(path) as picture:
        return scaled_to_side(picture.convert("RGB"), _CELL), picture.info.get("prompt", "")


def _fitted(title: str, font: AnyFont) -> str:
    """The title in lines that fit above a column: broken between words, and without the middle of longer ones."""
    lines: list[str] = []
    for part in title.split("\n"):
        line = ""
        for word in part.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > _CELL:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(_shortened(line, font) for line in lines)


def _shortened(line: str, font: AnyFont) -> str:
    kept, short = len(line), line
    while kept > 1 and font.getlength(short) > _CELL:
        kept -= 1
        short = f"{line[: kept // 2]}…{line[len(line) - (kept + 1) // 2 :]}"
    return short
