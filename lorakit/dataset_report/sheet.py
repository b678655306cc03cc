"""Data sheets: the images of a dataset as the first epoch trains on them, with bucket and caption, in pages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.config.train_config import TrainConfig
from lorakit.data.images.augmentation import augmented_picture
from lorakit.data.index import default_workers
from lorakit.dataset_report.report import DataReport, ImageReport
from lorakit.errors import DataError, OutputError
from lorakit.utils.atomic_io import unwritable_reason, write_atomically
from lorakit.utils.rng import keyed_generator
from lorakit.utils.sheets import font_for, scaled_to_side, wrap_to_width
from lorakit.utils.wording import counted, shown_path

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLUMNS, ROWS = 6, 8
"""Images side by side, and rows of them on a page."""
_CELL = 200
"""Pixels along the longer side of an image on a page."""
_GAP, _HEAD, _LINE, _TEXT_SIZE = 12, 30, 15, 12
_CAPTION_LINES = 6
_TEXT_HEIGHT = (_CAPTION_LINES + 3) * _LINE + 6
_PITCH = _CELL + _TEXT_HEIGHT + _GAP
_MARK = "lorakit data sheet"
"""What the PNG files of a sheet say that they are, so that a later sheet may replace them."""
_GREY, _RED = "#666666", "#c00000"


@frozen
class _Row:
    """A heading, or images side by side."""

    heading: str = ""
    images: tuple[ImageReport, ...] = ()

    @property
    def height(self) -> int:
        return _HEAD if self.heading else _PITCH


def check_sheet_path(path: Path, config: TrainConfig) -> None:
    """Raise OutputError where a sheet would replace another file, or be trained on."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"{path}: a sheet is a PNG file; give it a name such as {path.with_suffix('.png').name}")
    folders = {subset.image_dir for dataset in config.data.datasets for subset in dataset.subsets}
    if path.absolute().parent.resolve() in {folder.resolve() for folder in folders}:
        raise OutputError(f"{path} would be in a folder of training images, and trained on; choose another folder")
    if reason := unwritable_reason(path.parent):
        raise OutputError(f"{path}: {reason}; choose another folder")
    _check_replaceable(path)


def _check_replaceable(path: Path) -> None:
    from PIL import Image

    if not path.exists():
        return
    try:
        with Image.open(path) as found:
            is_sheet = found.info.get("Software") == _MARK
    except (OSError, ValueError, SyntaxError):
        is_sheet = False
    if not is_sheet:
        raise OutputError(f"{path} exists already, and is not a data sheet; give another name, or remove it first")


def write_sheet(path: Path, report: DataReport, seed: int, most: int) -> list[Path]:
    """Write the first `most` images of a report as PNG files, a page each, and give their paths.

    Crops, colours and mirroring that vary are those of the first epoch of a run with this seed. Raises OutputError.
    """
    pages = list(_pages(report, most))
    paths = [path, *(path.with_name(f"{path.stem}-{number + 2}{path.suffix}") for number in range(len(pages) - 1))]
    for own in paths:
        _check_replaceable(own)
    for own, rows in zip(paths, pages, strict=True):
        write_atomically(own, _png(_draw(rows, report, seed)))
    return paths


def _png(page: Image) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info, content = PngInfo(), io.BytesIO()
    info.add_text("Software", _MARK)
    page.save(content, "PNG", pnginfo=info)
    return content.getvalue()


def _pages(report: DataReport, most: int) -> Iterator[list[_Row]]:
    """The rows of each page; each subset begins a row of its own, and the last row says how many are left out."""
    page: list[_Row] = []
    for row in _rows(report, most):
        if sum(own.height for own in [*page, row]) > ROWS * _PITCH + 2 * _HEAD:
            yield page
            page = []
        page.append(row)
    yield page


def _rows(report: DataReport, most: int) -> Iterator[_Row]:
    left = most
    for subset in report.subsets:
        shown = subset.images[:left]
        left -= len(shown)
        if shown:
            count = counted(len(subset.images), "image")
            yield _Row(f"{subset.place}: {count if len(shown) == len(subset.images) else f'{len(shown)} of {count}'}")
        for start in range(0, len(shown), COLUMNS):
            yield _Row(images=shown[start : start + COLUMNS])
    if len(report.images) > most:
        yield _Row(f"… and {counted(len(report.images) - most, 'image')} more, which are not drawn")


def _draw(rows: Sequence[_Row], report: DataReport, seed: int) -> Image:
    """A page."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (COLUMNS * (_CELL + _GAP) + _GAP, sum(row.height for row in rows) + _GAP), "white")
    draw = ImageDraw.Draw(page)
    images = [image for row in rows for image in row.images]
    texts = [row.heading for row in rows] + [text for own in images for text in (own.path.name, own.caption)]
    text = "".join(filter(None, texts))
    draw.font = font_for(text, _TEXT_SIZE)
    with ThreadPoolExecutor(default_workers()) as pool:
        pictures = pool.map(partial(_picture, seed=seed), images)
        top = _GAP
        for row in rows:
            if row.heading:
                draw.text((_GAP, top), row.heading, fill="black", font=font_for(text, _TEXT_SIZE + 4))
            for column, image in enumerate(row.images):
                left, picture = _GAP + column * (_CELL + _GAP), next(pictures)
                if isinstance(picture, str):
                    draw.multiline_text((left, top), wrap_to_width(draw, picture, _CELL, 12), fill=_RED)
                else:
                    page.paste(picture, (left + (_CELL - picture.width) // 2, top + _CELL - picture.height))
                _label(draw, (left, top + _CELL + 4), image, report)
            top += row.height
    return page


def _label(draw: ImageDraw, place: tuple[int, int], image: ImageReport, report: DataReport) -> None:
    """What is written below an image: its name, its bucket and what became of it, and its caption."""
    left, top = place
    draw.text((left, top), wrap_to_width(draw, image.path.name, _CELL, 1), fill="black")
    width, height = image.bucket
    cropped = "crop varies" if image.cropped is None else f"{image.cropped:.0%} cropped" if image.is_cropped else ""
    enlarged = f"enlarged {image.enlarged:.1f}x" if image.is_enlarged else ""
    use = "held out" if image.held_out else f"{image.appearances}x an epoch" if image.appearances != 1 else ""
    facts = wrap_to_width(draw, ", ".join(filter(None, (f"{width}x{height}", use, cropped, enlarged))), _CELL, 2)
    draw.multiline_text((left, top + _LINE), facts, fill=_GREY, spacing=2)
    caption, colour, most = image.caption or "no caption", "black" if image.caption else _RED, _CAPTION_LINES
    top += (2 + facts.count("\n")) * _LINE + 2
    if report.is_cut(image):
        draw.text((left, top), f"cut: {image.tokens} tokens", fill=_RED)
        top, most = top + _LINE, most - 1
    draw.multiline_text((left, top), wrap_to_width(draw, caption, _CELL, most), fill=colour, spacing=2)


def _picture(image: ImageReport, seed: int) -> Image | str:
    """An image as the first epoch has it, small, and paler where its loss counts less; or what is wrong with it."""
    import numpy as np
    from PIL import Image

    example = image.example

    def draw(purpose: str) -> np.random.Generator:
        return keyed_generator(seed, purpose, 1, example.sample_id, 0)

    try:
        made = augmented_picture(example, draw)
    except DataError as error:
        return str(error).replace(str(image.path), shown_path(image.path))
    pixels = made.pixels
    if made.mask is not None:
        weight = 0.25 + 0.75 * made.mask[..., None].astype(np.float32) / 255
        pixels = (255 - (255 - pixels) * weight).astype(np.uint8)
    return scaled_to_side(Image.fromarray(np.ascontiguousarray(pixels)), _CELL)
