"""Makes folders of captioned images to measure with, from the photographs that scikit-image has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data_dir

PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "retina.jpg", "rocket.jpg",
)  # fmt: skip


def make_images(folder: Path, count: int, sides: tuple[int, int]) -> None:
    """Parts of photographs with sides between these, PNG and JPEG in turn, each with its caption; those missing."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = []
    for name in PHOTOGRAPHS:
        with Image.open(Path(data_dir) / name) as image:
            photographs.append(image.convert("RGB"))
    for number in range(count):
        path, source = folder / f"{number:06}.{('png', 'jpg')[number % 2]}", number // 2 % len(photographs)
        if not path.exists():
            path.with_suffix(".txt").write_text(f"a part of {PHOTOGRAPHS[source]}, number {number}\n")
            unfinished = folder / f".unfinished{path.suffix}"
            _part(photographs[source], sides, np.random.default_rng(number)).save(unfinished)
            unfinished.rename(path)


def _part(photograph: Image.Image, sides: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    """A part of a photograph, enlarged where the photograph is too small for it."""
    width, height = (int(side) for side in generator.integers(*sides, size=2, endpoint=True))
    scale = max(1.0, width / photograph.width, height / photograph.height)
    own_width, own_height = int(width / scale), int(height / scale)
    left = int(generator.integers(0, photograph.width - own_width, endpoint=True))
    top = int(generator.integers(0, photograph.height - own_height, endpoint=True))
    return photograph.resize((width, height), box=(left, top, left + own_width, top + own_height))
