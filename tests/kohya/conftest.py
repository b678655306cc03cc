"""A folder as sd-scripts is called in, and conversions there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lorakit.config.load import config_from_tables
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.training_scripts import ANIMA_TRAIN_NETWORK, FLUX_TRAIN_NETWORK, SDXL_TRAIN_NETWORK
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


FLUX_SHAPES = {
    "double_blocks.0.img_attn.qkv.weight": (8, 8), "img_in.weight": (8, 64), "guidance_in.in_layer.weight": (8, 8),
}  # fmt: skip
CHROMA_SHAPES = {
    "double_blocks.0.img_attn.qkv.weight": (8, 8), "img_in.weight": (8, 64),
    "distilled_guidance_layer.in_proj.weight": (8, 8),
}  # fmt: skip
SCHNELL_SHAPES = {name: shape for name, shape in FLUX_SHAPES.items() if "guidance" not in name}
ANIMA_SHAPES = {"blocks.0.mlp.layer1.weight": (8, 8), "llm_adapter.blocks.0.cross_attn.q_proj.weight": (8, 8)}
"""The tensors by which models are known."""


@pytest.fixture
def flux_least(folder: Path) -> tuple[str, ...]:
    """The fewest words of a line for FLUX.1 of which none is a mistake; headers of its kinds are in the folder."""
    for name, shapes in {"flux": FLUX_SHAPES, "schnell": SCHNELL_SHAPES, "chroma": CHROMA_SHAPES}.items():
        write_safetensors(folder / f"{name}.safetensors", shapes)
    return (
        "flux_train_network.py", "--pretrained_model_name_or_path=flux.safetensors", "--output_dir=out",
        "--network_module=networks.lora_flux", "--dataset_config=dataset.toml", "--guidance_scale=1",
        "--model_prediction_type=raw",
    )  # fmt: skip


@pytest.fixture
def chroma_least(flux_least: tuple[str, ...]) -> tuple[str, ...]:
    """The fewest words of a line for Chroma of which none is a mistake."""
    changed = ("--pretrained_model_name_or_path=chroma.safetensors", "--guidance_scale=0", "--model_type=chroma")
    return (*flux_least, "--apply_t5_attn_mask", *changed)


@pytest.fixture
def flow_leasts(
    flux_least: tuple[str, ...], chroma_least: tuple[str, ...], anima_least: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """The fewest words of a line for each family of flow matching."""
    return {"flux": flux_least, "chroma": chroma_least, "anima": anima_least}


@pytest.fixture
def anima_least(folder: Path) -> tuple[str, ...]:
    """The fewest words of a line for Anima; the model's header is in the folder."""
    write_safetensors(folder / "anima.safetensors", ANIMA_SHAPES)
    return (
        "anima_train_network.py", "--pretrained_model_name_or_path=anima.safetensors", "--output_dir=out",
        "--network_module=networks.lora_anima", "--dataset_config=dataset.toml",
    )  # fmt: skip


@pytest.fixture
def leasts(
    xl_least: tuple[str, ...], flux_least: tuple[str, ...], anima_least: tuple[str, ...]
) -> Callable[[str], tuple[str, ...]]:
    """A function from an option's name to the fewest words of a line for a script that has it."""
    words = {SDXL_TRAIN_NETWORK: xl_least, FLUX_TRAIN_NETWORK: flux_least, ANIMA_TRAIN_NETWORK: anima_least}

    def of(name: str) -> tuple[str, ...]:
        scripts = OPTIONS[name].scripts
        return words[scripts[0]] if scripts else LEAST

    return of


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
