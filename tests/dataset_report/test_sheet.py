"""The sheet and the command: pictures as training sees them, pages, and files that are not replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import lorakit
from lorakit.cli.group import cli
from lorakit.dataset_report import sheet
from lorakit.dataset_report.sheet import write_sheet
from lorakit.errors import OutputError
from lorakit.utils.sheets import font_for

Tables = Callable[..., dict[str, Any]]
Save = Callable[..., Path]

CELL, GAP, HEAD, PITCH = (getattr(sheet, f"_{name}") for name in ("CELL", "GAP", "HEAD", "PITCH"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def cell(path: Path, column: int = 0, row: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The place of an image on a sheet, [H, W, 3]; text below it is not in it."""
    left, top = GAP + column * (CELL + GAP), GAP + HEAD + row * PITCH
    return np.asarray(Image.open(path).convert("RGB"))[top : top + CELL, left : left + CELL]


def shares(pixels: np.ndarray[Any, np.dtype[np.uint8]], *colours: tuple[int, int, int]) -> list[float]:
    """How much of a picture has each colour."""
    return [float((np.abs(pixels.astype(int) - colour).max(axis=-1) < 40).mean()) for colour in colours]


def run(tmp_path: Path, tables: dict[str, Any], *arguments: str) -> Result:
    """Run `lorakit data` on a config of these tables."""
    data = "\n".join(f"{key} = {str(value).lower()}" for key, value in tables["data"].items() if key != "image_dir")
    (tmp_path / "config.toml").write_text(
        f'[model]\npath = "{tables["model"]["path"]}"\n[data]\nimage_dir = "photos"\n{data}\n[output]\ndir = "out"\n'
    )
    return CliRunner().invoke(cli, ["data", str(tmp_path / "config.toml"), *arguments])


def test_a_picture_is_cropped_as_it_is_trained(photos: Path, tables: Tables, save: Save, tmp_path: Path) -> None:
    """What is cropped away is not on the sheet, and the bucket's shape is kept."""
    save(photos / "a.png", blue=64, red=64, lime=64)
    (path,) = write_sheet(tmp_path / "data.png", lorakit.report_data(tables(enable_bucket=False)), 0, 9)
    assert shares(cell(path), (255, 0, 0), (0, 0, 255), (0, 255, 0)) == pytest.approx([1, 0, 0], abs=0.03)
    (path,) = write_sheet(tmp_path / "wide.png", lorakit.report_data(tables()), 0, 9)
    red, blue, white = shares(cell(path), (255, 0, 0), (0, 0, 255), (255, 255, 255))
    assert red == pytest.approx(blue, abs=0.03)
    assert white > 0.5


def test_what_is_mirrored_and_masked(photos: Path, tables: Tables, save: Save, tmp_path: Path) -> None:
    """Masked parts are paler, and mirroring is that of the first epoch, which differs from image to image."""
    for number in range(12):
        save(photos / f"{number}.png", red=32, blue=32)
    (path,) = write_sheet(tmp_path / "data.png", lorakit.report_data(tables(flip_aug=True)), 0, 12)
    lefts = {tuple(cell(path, number % 6, number // 6)[100, 20]) for number in range(12)}
    assert lefts == {(255, 0, 0), (0, 0, 255)}
    (tmp_path / "masks").mkdir()
    for number in range(12):
        save(tmp_path / "masks" / f"{number}.png", white=32, black=32)
    masked = tables(conditioning_data_dir=tmp_path / "masks")
    (path,) = write_sheet(tmp_path / "masked.png", lorakit.report_data(masked), 0, 12)
    assert tuple(cell(path)[100, 20]) == (255, 0, 0)
    assert tuple(cell(path)[100, 180]) == pytest.approx((191, 191, 255), abs=2)


def test_what_is_written_below(photos: Path, tables: Tables, save: Save, tmp_path: Path) -> None:
    """A caption is black; a missing one is red."""
    for name in ("a", "b"):
        save(photos / f"{name}.png", blue=64)
    (photos / "a.txt").write_text("日本語 and a_very_long_tag_" + "x" * 200)
    (path,) = write_sheet(tmp_path / "data.png", lorakit.report_data(tables()), 0, 9)
    below = np.asarray(Image.open(path).convert("RGB"))[GAP + HEAD + CELL + 36 :].astype(int)
    reds = [
        (part[..., 0] - part[..., 1] > 100).any() for part in (below[:, :CELL], below[:, CELL + GAP : 2 * CELL + GAP])
    ]
    assert reds == [False, True]
    assert below[:, :CELL].min() < 50


@pytest.mark.skipif(font_for("ü", 12).getname() == font_for("u", 12).getname(), reason="no font here has an ü")
def test_letters_that_are_not_ascii_are_drawn(photos: Path, tables: Tables, save: Save, tmp_path: Path) -> None:
    """Captions show them as they are, not as the box that stands for all letters that a font lacks."""
    save(photos / "a.png", blue=64)
    below = []
    for letter in "üö":
        (photos / "a.txt").write_text(letter)
        (path,) = write_sheet(tmp_path / f"{letter}.png", lorakit.report_data(tables()), 0, 9)
        below.append(np.asarray(Image.open(path).convert("RGB"))[GAP + HEAD + CELL :])
    assert (below[0] != below[1]).any()


def test_pages_and_the_rest(photos: Path, tables: Tables, save: Save, tmp_path: Path) -> None:
    """Large sets get pages, up to a number of images; the others are counted."""
    for number in range(56):
        save(photos / f"{number:02}.png", height=8, red=8)
    result = run(tmp_path, tables(), "--sheet", str(tmp_path / "data.png"), "--sheet-images", "55")
    assert result.exit_code == 0, result.output
    assert "data.png and " in result.output.replace("\n", " ")
    assert "data-2.png, with the first 55 of 56 images" in result.output.replace("\n", " ")
    assert shares(cell(tmp_path / "data.png", 5, 7), (255, 0, 0)) == [1]
    assert not (tmp_path / "data-3.png").exists()
    again = run(tmp_path, tables(), "--sheet", str(tmp_path / "data.png"))
    assert again.exit_code == 0, again.output


def test_damage_is_on_the_sheet(photos: Path, tables: Tables, save: Save, tmp_path: Path) -> None:
    """An image that cannot be decoded leaves its place to the reason; the others are drawn."""
    save(photos / "a.png", 900, red=900)
    save(photos / "b.png", lime=64)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "a.png")
    content = bytearray((photos / "a.png").read_bytes())
    content[3000:3040] = bytes(40)
    (photos / "a.png").write_bytes(content)
    (path,) = write_sheet(tmp_path / "data.png", lorakit.report_data(tables()), 0, 9)
    assert shares(cell(path, 1), (0, 255, 0)) == [1]
    assert shares(cell(path, 0), (255, 255, 255))[0] > 0.7


def test_other_files_are_not_replaced(photos: Path, tables: Tables, save: Save, tmp_path: Path) -> None:
    """A picture or any other file under the name is kept; so is a second page's."""
    save(photos / "a.png", red=8)
    picture = save(tmp_path / "mine.png", lime=8)
    before = picture.read_bytes()
    result = run(tmp_path, tables(), "--sheet", str(picture))
    assert isinstance(result.exception, OutputError)
    assert (
        str(result.exception)
        == f"{picture} exists already, and is not a data sheet; give another name, or remove it first"
    )
    assert picture.read_bytes() == before
    (tmp_path / "text.png").write_text("no picture")
    assert isinstance(run(tmp_path, tables(), "--sheet", str(tmp_path / "text.png")).exception, OutputError)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("data.jpg", "a sheet is a PNG file; give it a name such as data.png"),
        ("photos/data.png", "and trained on"),
        ("config.toml/data.png", "is a file, not a folder"),
    ],
)
def test_names_that_cannot_be(photos: Path, tables: Tables, save: Save, tmp_path: Path, name: str, reason: str) -> None:
    """Another format, and a place in which the sheet would be trained on, are refused before anything is read."""
    save(photos / "a.png", red=8)
    result = run(tmp_path, tables(), "--sheet", str(tmp_path / name))
    assert isinstance(result.exception, OutputError)
    assert reason in str(result.exception)
    assert not (tmp_path / name).exists()


def test_the_command(photos: Path, tables: Tables, save: Save, tmp_path: Path) -> None:
    """Report and warnings are printed, and keys can be set; the help has an example."""
    save(photos / "a.png", red=100, lime=100)
    result = run(tmp_path, tables(), "--set", "data.num_repeats=4")
    assert result.exit_code == 0, result.output
    assert "photos: 1 image; 4 an epoch, repeats counted" in result.output
    assert "warning: 1 of 1 images in" in result.output
    help_text = CliRunner().invoke(cli, ["data", "--help"]).output
    assert "lorakit data config.toml --sheet data.png" in help_text
