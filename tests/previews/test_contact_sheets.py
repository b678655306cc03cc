"""Contact sheets: every preview in its place, the later of two, and no more of them than can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakit.previews import contact_sheet as contact_sheets
from lorakit.previews.contact_sheet import MAX_COLUMNS, MAX_ROWS, find_previews, write_contact_sheet, write_sheet
from lorakit.previews.previews import write_png
from lorakit.utils.sheets import font_for

Colour = tuple[int, int, int]

CELL, GAP, LABEL = (getattr(contact_sheets, f"_{name}") for name in ("CELL", "GAP", "LABEL"))
HEAD = GAP + 24
"""Pixels above the pictures, for one line of text."""


@pytest.fixture
def save(tmp_path: Path):
    """A function that saves a preview of one colour, as a run does."""

    def saved(
        step: int, prompt: int, colour: tuple[int, int, int], time: int = 0, size: tuple[int, int] = (8, 8)
    ) -> Path:
        path = tmp_path / f"cat_{step:06d}_{prompt:02d}_{20260101000000 + time}_7.png"
        pixels = np.broadcast_to(np.array(colour, np.uint8), (size[1], size[0], 3)).copy()
        write_png(path, pixels, {"training_step": str(step), "prompt": f"prompt {prompt}"})
        return path

    return saved


def sheet_of(paths: list[Path], last_step: int = 10**6) -> Image.Image:
    """The contact sheet of files."""
    path = paths[0].parent / "sheet.png"
    write_contact_sheet(path, find_previews(paths, last_step))
    return Image.open(path).convert("RGB")


def colour_at(sheet: Image.Image, column: int, row: int, down: float = 0.5) -> Colour:
    """The colour in the middle of a place on a sheet, or higher or lower in it."""
    pitch = CELL + GAP
    left, top = LABEL + GAP + pitch * column + CELL // 2, HEAD + pitch * row + int(CELL * down)
    pixel = sheet.getpixel((left, top))
    assert isinstance(pixel, tuple)
    return pixel[0], pixel[1], pixel[2]


def test_rows_are_prompts_and_columns_are_steps(save) -> None:
    """Each picture stands in its prompt's row and its step's column; where none was drawn, the paper is white."""
    colours = {(0, 0): (200, 0, 0), (0, 1): (0, 200, 0), (50, 0): (0, 0, 200)}
    sheet = sheet_of([save(step, prompt, colour) for (step, prompt), colour in colours.items()])
    assert [colour_at(sheet, *place) for place in ((0, 0), (0, 1), (1, 0), (1, 1))] == [
        (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255),
    ]  # fmt: skip
    label = np.asarray(sheet)[HEAD : HEAD + CELL, :LABEL]
    assert label.min() < 100


def test_wide_pictures_keep_their_shape(save) -> None:
    """A picture twice as wide as high fills the width of its place and half of the height."""
    sheet = sheet_of([save(0, 0, (200, 0, 0), size=(64, 32))])
    assert [colour_at(sheet, 0, 0, down) for down in (0.2, 0.3, 0.7, 0.8)] == [
        (255, 255, 255), (200, 0, 0), (200, 0, 0), (255, 255, 255),
    ]  # fmt: skip


def test_the_later_of_two_counts(save) -> None:
    """Of two files for one prompt and step, the one drawn later is shown."""
    paths = [save(0, 0, (0, 200, 0), time=5), save(0, 0, (200, 0, 0), time=1)]
    assert colour_at(sheet_of(paths), 0, 0) == (0, 200, 0)


def test_many_are_thinned_out(save) -> None:
    """Of many steps the first, the last and some between are shown; of many prompts the first."""
    steps = [save(step, 0, (step, 0, 0)) for step in range(40)]
    prompts = [save(0, prompt, (0, 100, 0)) for prompt in range(1, MAX_ROWS + 5)]
    sheet = sheet_of(steps + prompts)
    shown = [colour_at(sheet, column, 0)[0] for column in range(MAX_COLUMNS)]
    assert (shown[0], shown[-1]) == (0, 39)
    assert shown == sorted(set(shown))
    assert sheet.height == HEAD + (CELL + GAP) * MAX_ROWS + GAP


def test_what_is_no_preview_is_passed_over(save, tmp_path: Path) -> None:
    """Other pictures, damaged files and previews of a later step are not among the previews found."""
    wanted = save(3, 0, (200, 0, 0))
    other, broken = tmp_path / "cat.png", tmp_path / "cat_000001_00_20260101000000.png"
    other.write_bytes(wanted.read_bytes())
    broken.write_bytes(wanted.read_bytes()[:20])
    previews = find_previews([other, broken, save(9, 0, (0, 0, 0)), wanted], last_step=3)
    assert [preview.path for preview in previews] == [wanted]


def test_pictures_that_are_gone_are_left_out(save) -> None:
    """A preview that was deleted since leaves its place empty."""
    paths = [save(step, 0, (200, 0, 0)) for step in (0, 1)]
    previews = find_previews(paths, last_step=1)
    paths[0].unlink()
    sheet = paths[1].parent / "sheet.png"
    write_contact_sheet(sheet, previews)
    assert colour_at(Image.open(sheet).convert("RGB"), 0, 0) == (200, 0, 0)


def test_long_titles(save, tmp_path: Path) -> None:
    """They are broken between words, and end where their column does; pictures are below the longest."""
    paths = [save(1, 0, (200, 0, 0))]
    titles = ["rank=8", "rank=8 lr=4e-3 alpha=16 dropout=0.1 a-file-name-that-is-longer-than-its-column"]
    write_sheet(tmp_path / "sheet.png", dict.fromkeys(titles, paths))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    head = GAP + 3 * 24
    assert len(sheet) == head + CELL + GAP + GAP
    words = sheet[:head, LABEL + GAP :]
    rows = [(words[line : line + 18, CELL + GAP :] < 128).any() for line in (GAP, GAP + 19, GAP + 38)]
    assert rows == [True] * 3
    assert (words[:, -GAP:] == 255).all()
    assert (words[:, CELL : CELL + GAP] == 255).all()


@pytest.mark.skipif(font_for("ü", 14).getname() == font_for("u", 14).getname(), reason="no font here has an ü")
def test_letters_that_are_not_ascii_are_drawn(tmp_path: Path) -> None:
    """Titles and prompts show them as they are, not as the box that stands for all letters that a font lacks."""
    sheets = []
    for letter in "üö":
        write_png(tmp_path / f"{letter}.png", np.zeros((8, 8, 3), np.uint8), {"prompt": f"a {letter}"})
        write_sheet(tmp_path / "sheet.png", {letter: [tmp_path / f"{letter}.png"]})
        sheets.append(np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")))
    assert (sheets[0][:HEAD] != sheets[1][:HEAD]).any()
    assert (sheets[0][HEAD:, :LABEL] != sheets[1][HEAD:, :LABEL]).any()
