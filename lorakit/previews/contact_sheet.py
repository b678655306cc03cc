"""Contact sheets: the previews of a run side by side, a row for each prompt and a column for each time of drawing."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.utils.atomic_io import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

MAX_ROWS, MAX_COLUMNS = 16, 8
"""How many prompts and how many times of drawing a sheet shows at most."""
_CELL = 160
"""Pixels along the longer side of an image on the sheet."""
_GAP, _LABEL, _HEAD = 8, 180, 32
"""Pixels between images, for the prompts on the left, and for the steps at the top."""
_TEXT_SIZE = 14
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
    content = io.BytesIO()
    _sheet(places, prompts, steps).save(content, "PNG")
    write_atomically(path, content.getvalue())


def _sheet(places: Mapping[tuple[int, int], Path], prompts: list[int], steps: list[int]) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    pitch = _CELL + _GAP
    size = (_LABEL + pitch * len(steps) + _GAP, _HEAD + pitch * len(prompts) + _GAP)
    paper = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(paper)
    draw.font = ImageFont.load_default(_TEXT_SIZE)
    for column, step in enumerate(steps):
        left = _LABEL + pitch * column + _GAP
        draw.text((left, _GAP), f"step {step}" if step else "before training", fill="black")
        for row, prompt in enumerate(prompts):
            if (prompt, step) not in places:
                continue
            top = _HEAD + pitch * row
            picture, text = _thumbnail(places[prompt, step])
            paper.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
            if step == steps[-1]:
                draw.multiline_text((_GAP, top), _wrapped(draw, text), fill="black")
    return paper


@lru_cache(maxsize=MAX_ROWS * MAX_COLUMNS)
def _thumbnail(path: Path) -> tuple[Image, str]:
    """A preview as large as its place on the sheet, and its prompt."""
    from PIL import Image

    with Image.open(path) as picture:
        scale = _CELL / max(picture.size)
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), picture.info.get("prompt", "")


def _wrapped(draw: ImageDraw, text: str) -> str:
    """The text in lines that fit beside the images, cut off where it is longer than these are high."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= _LABEL - _GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    most = _CELL // (_TEXT_SIZE + 4)
    return "\n".join(lines[:most]) + (" …" if len(lines) > most else "")
