"""A folder as sd-scripts is called in, and conversions there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.command_line import read_arguments
from lorakit.kohya.conversion import convert
from lorakit.kohya.draft import Draft
from lorakit.plugins.catalog import Catalog
from tests.config.conftest import SD1_SHAPES, SDXL_SHAPES, write_safetensors

LEAST = (
    "--pretrained_model_name_or_path=model.safetensors", "--output_dir=out", "--network_module=networks.lora",
    "--dataset_config=dataset.toml",
)  # fmt: skip
"""The fewest options that say what to train."""

DATASET = """
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 64

[[datasets.subsets]]
image_dir = "train/2_dog"
"""

TRACKER = """
[wandb]
name = "first"
entity = "team"
tags = ["a", "b"]
job_type = "training"
"""

Convert = Callable[..., Draft]


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """What is installed."""
    return Catalog.discover()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the header of a model, a dataset file, and folders of images with repeats in their names."""
    write_safetensors(tmp_path / "model.safetensors", SD1_SHAPES)
    (tmp_path / "dataset.toml").write_text(DATASET)
    (tmp_path / "tracker.toml").write_text(TRACKER)
    for name in ("train/10_cat", "train/2_dog", "train/notes", "train/0_none"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (80, 70), "teal").save(tmp_path / name / "image.png")
        (tmp_path / name / "image.txt").write_text("an animal")
    return tmp_path


@pytest.fixture
def xl_least(folder: Path) -> tuple[str, ...]:
    """The fewest words of a line for SDXL; the model's header is in the folder."""
    write_safetensors(folder / "xl.safetensors", SDXL_SHAPES)
    return ("sdxl_train_network.py", "--pretrained_model_name_or_path=xl.safetensors", *LEAST[1:])


@pytest.fixture
def converted(folder: Path, catalog: Catalog) -> Convert:
    """A function from words of a command line to the draft for a config in the same folder, or in `target`."""

    def make(
        *words: str, least: tuple[str, ...] = LEAST, target: Path = folder, with_catalog: Catalog = catalog
    ) -> Draft:
        return convert(read_arguments([*least, *words], folder), folder, target, with_catalog)

    return make


def check(draft: Draft, target: Path, catalog: Catalog) -> tuple[Problem, ...]:
    """What `lorakit check` would say is wrong with the config, such as files that are not there yet."""
    try:
        config_from_tables(draft.tables(), target, catalog)
    except ConfigError as error:
        return error.problems
    return ()
