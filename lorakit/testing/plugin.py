"""lorakit's pytest plugin: fixtures for the tests of plugins.

It is loaded wherever lorakit and pytest are installed, so importing it imports nothing heavy and has no
effect on tests that do not use its fixtures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("lorakit.testing.contracts")

CAPTIONS = {
    "beach": ((96, 64), "a beach, yellow sand, blue sky"),
    "meadow": ((64, 96), "a meadow, green grass, red sun"),
    "night": ((80, 80), "a city at night, white moon"),
    "snow": ((96, 80), "a field of snow, grey sky"),
}
"""Name, size in pixels and caption of each image in `photographs`."""


@pytest.fixture(scope="session")
def lorakit_offline() -> Iterator[None]:
    """Sets HF_HUB_OFFLINE for tests that use the tiny model, so that they do not access the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def lorakit_one_thread() -> Iterator[None]:
    """Limits torch to one thread during the test, which is fastest for a tiny model."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_sd1(lorakit_offline: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """A diffusers folder with a Stable Diffusion 1.x of two million random weights; read-only."""
    from lorakit.testing.models import make_tiny_sd1

    return make_tiny_sd1(tmp_path_factory.mktemp("models") / "tiny-sd1")


@pytest.fixture(scope="session")
def tiny_sd1_file(tiny_sd1: Path) -> Path:
    """The model of `tiny_sd1` as one `.safetensors` file in the original layout."""
    from lorakit.testing.models import to_single_file

    return to_single_file(tiny_sd1, tiny_sd1.with_suffix(".safetensors"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four small images of several shapes, and their captions; read-only."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, (size, caption) in CAPTIONS.items():
        _draw(folder / f"{name}.png", size)
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture
def train_tables(
    tiny_sd1: Path,
    photographs: Path,
    tmp_path: Path,
    lorakit_one_thread: None,  # noqa: ARG001
) -> dict[str, Any]:
    """The tables of a config that trains four steps on the CPU in about a second; a test may change them.

    `lorakit.train(train_tables)` writes the file `tmp_path / "out" / "lora.safetensors"`, and
    `lorakit.testing.runs.train_config(train_tables, tmp_path)` is the config. Encoded images are shared by all tests.
    """
    return {
        "model": {"path": str(tiny_sd1)},
        "data": {
            "image_dir": str(photographs),
            "resolution": 64,
            "batch_size": 2,
            "cache_dir": str(photographs.with_name(f"{photographs.name}-cache")),
        },
        "optimizer": {"lr": 1e-3},
        "training": {"max_epochs": 2, "device": "cpu"},
        "output": {"dir": str(tmp_path / "out")},
    }


def _draw(path: Path, size: tuple[int, int]) -> None:
    """An image with a smooth background, a disc and film grain; a function of its name."""
    import numpy as np
    from PIL import Image

    from lorakit.utils.rng import keyed_generator

    generator = keyed_generator("photographs", path.stem)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    top, bottom, disc = generator.uniform(0, 255, (3, 3))
    pixels = top + (bottom - top) * (y / height)[..., None]
    center_x, center_y = generator.uniform(0.3, 0.7, 2) * size
    pixels[np.hypot(x - center_x, y - center_y) < min(size) / 4] = disc
    pixels += generator.normal(0, 8, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
