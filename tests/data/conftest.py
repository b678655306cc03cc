"""Folders of photographs to train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import skimage
from attrs import evolve
from PIL import Image

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.cache.store import Cache
from tests.data.tiny import TinyModel

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="session")
def photograph() -> Callable[..., Image.Image]:
    """A photograph by name, made as small as asked for."""

    def make(name: str = "chelsea.png", size: tuple[int, int] = (96, 64)) -> Image.Image:
        with Image.open(PHOTOGRAPHS / name) as image:
            return image.convert("RGB").resize(size)

    return make


@pytest.fixture
def folder(tmp_path: Path, photograph: Callable[..., Image.Image]) -> Path:
    """Five captioned photographs of three shapes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    sources = {
        "astronaut": (64, 64),
        "chelsea": (96, 64),
        "coffee": (96, 64),
        "rocket": (64, 96),
        "motorcycle": (96, 64),
    }
    files = {"rocket": "rocket.jpg", "motorcycle": "motorcycle_left.png"}
    for name, size in sources.items():
        photograph(files.get(name, f"{name}.png"), size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"photo, {name}, sharp")
    return folder


@pytest.fixture
def dataset(folder: Path) -> DatasetConfig:
    """The photographs in buckets of about 96x96 pixels."""
    return DatasetConfig(
        subsets=(SubsetConfig(image_dir=folder),),
        resolution=(96, 96),
        batch_size=2,
        enable_bucket=True,
        min_bucket_reso=64,
        max_bucket_reso=160,
        bucket_reso_steps=16,
    )


@pytest.fixture
def with_subset(dataset: DatasetConfig) -> Callable[..., DatasetConfig]:
    """The dataset with other settings of its subset."""

    def make(**settings: object) -> DatasetConfig:
        return evolve(dataset, subsets=(evolve(dataset.subsets[0], **settings),))

    return make


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def model() -> TinyModel:
    """A base model that has encoded nothing yet."""
    return TinyModel()


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[[Mapping[str, bytes]], Path]:
    """A folder with files of this content."""

    def write(files: Mapping[str, bytes]) -> Path:
        folder = tmp_path / "written"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    return write
