"""A folder of photographs, each with something to report, and its config."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import skimage
from PIL import Image

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"

CAPTIONS: Mapping[str, str | None] = {
    "astronaut.png": "woman, space suit, smile",
    "chelsea.png": "cat, whiskers",
    "coffee.png": "cup, " + ", ".join(f"thing number {number}" for number in range(40)),
    "coins.png": None,
    "rocket.jpg": "",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five photographs: one has a long caption, one an empty one, one none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        shutil.copy(PHOTOGRAPHS / name, folder)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_text(caption)
    return folder


@pytest.fixture
def tables(tiny_sd1: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The tables of a config with other keys of `[data]`."""

    def make(**data: object) -> dict[str, Any]:
        usual = {"image_dir": tmp_path / "photos", "resolution": 256, "enable_bucket": True, "min_bucket_reso": 64}
        return {"model": {"path": tiny_sd1}, "data": usual | data, "output": {"dir": tmp_path / "out"}}

    return make


@pytest.fixture
def save() -> Callable[..., Path]:
    """A function that saves stripes of colours, as wide as they are said to be, as a picture."""

    def saved(path: Path, height: int = 64, **stripes: int) -> Path:
        picture = Image.new("RGB", (sum(stripes.values()), height))
        left = 0
        for colour, width in stripes.items():
            picture.paste(colour, (left, 0, left + width, height))
            left += width
        picture.save(path)
        return path

    return saved
