"""A folder that a config can be checked against: a base model without weights worth the name, and one image."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError
from lorakit.models.families.sd import state_dict_keys as layout
from lorakit.models.families.sd.config import StableDiffusionConfig
from lorakit.models.families.sd.structure import clip_shapes, projected_clip_shapes, unet_shapes, vae_shapes
from lorakit.plugins.catalog import Catalog
from lorakit.testing.models import TINY_SDXL

Tables = dict[str, Any]

UNET = {
    "block_out_channels": [8], "layers_per_block": 1, "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
}  # fmt: skip
VAE = {
    "block_out_channels": [4] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SD1_SHAPES = {
    **{layout.UNET_PREFIX + layout.original_unet_name(name, UNET): shape for name, shape in unet_shapes(UNET).items()},
    **{layout.VAE_PREFIX + layout.original_vae_name(name, VAE): shape for name, shape in vae_shapes(VAE).items()},
    **{f"{layout.TEXT_PREFIX}text_model.{name}": shape for name, shape in clip_shapes(CLIP).items()},
}
"""The tensors of a very small single-file Stable Diffusion 1.x, in their original names."""

UNET_XL = {
    **TINY_SDXL["unet"], "block_out_channels": [8] * 3, "cross_attention_dim": 32,
    "projection_class_embeddings_input_dim": 16 + 6 * 256,
}  # fmt: skip
CLIP_L, BIG_G = {**CLIP, "num_hidden_layers": 12}, {**CLIP, "num_hidden_layers": 32, "projection_dim": 16}


def _open_clip_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of SDXL's second text encoder in OpenCLIP's names; there, queries, keys and values are one."""
    shapes = {}
    for name, (first, *rest) in projected_clip_shapes(settings).items():
        original = layout.open_clip_name(name.removeprefix("text_model.")).removesuffix("text_projection.weight")
        if original.endswith("[0]"):
            shapes[original.removesuffix("[0]")] = (3 * first, *rest)
        elif not original.endswith("]"):
            shapes[original or "text_projection"] = (first, *rest)
    return shapes


SDXL_SHAPES = {
    **{
        layout.UNET_PREFIX + layout.original_unet_name(name, UNET_XL): shape
        for name, shape in unet_shapes(UNET_XL).items()
    },
    **{name: shape for name, shape in SD1_SHAPES.items() if name.startswith(layout.VAE_PREFIX)},
    **{f"conditioner.embedders.0.transformer.text_model.{name}": own for name, own in clip_shapes(CLIP_L).items()},
    **{f"conditioner.embedders.1.model.{name}": own for name, own in _open_clip_shapes(BIG_G).items()},
}
"""The tensors of a very narrow single-file SDXL, in their original names."""


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A safetensors file with zeros of these shapes in float16."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


def write_lora(path: Path, rank: int) -> Path:
    """A LoRA file with an adapter of that rank for each kind of layer that LoRA-LierLa adapts, as names tell."""
    prefixes = {"unet": "lora_unet_mid_block_x", "text_encoder": "lora_te_text_model_encoder_layers_0"}
    keys = [f"{prefixes[part.name]}_{layer}" for part in StableDiffusionConfig.parts for layer in part.lora_layers]
    shapes = {"lora_down": (rank, 8), "lora_up": (8, rank)}
    return write_safetensors(path, {f"{key}.{name}.weight": shape for key in keys for name, shape in shapes.items()})


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """What is installed."""
    return Catalog.discover()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the config file."""
    folder = tmp_path_factory.mktemp("base")
    write_safetensors(folder / "model.safetensors", SD1_SHAPES)
    for name in ("photos", "more"):
        (folder / name).mkdir()
        Image.new("RGB", (64, 64), "teal").save(folder / name / "image.png")
    return folder


@pytest.fixture
def tables() -> Tables:
    """The least that a config must say."""
    return {
        "model": {"path": "model.safetensors"},
        "data": {"image_dir": "photos", "resolution": 64},
        "output": {"dir": "out"},
    }


@pytest.fixture
def read(base: Path, catalog: Catalog) -> Callable[[Tables], TrainConfig]:
    """A function from tables to the config in them."""
    return lambda tables: config_from_tables(tables, base, catalog)


@pytest.fixture
def problems(base: Path, catalog: Catalog) -> Callable[[Tables], dict[str, str]]:
    """A function from tables to what is wrong with them: message and hint by key."""

    def problems(tables: Tables) -> dict[str, str]:
        with pytest.raises(ConfigError) as caught:
            config_from_tables(tables, base, catalog)
        found = {problem.key: f"{problem.message} ({problem.hint})" for problem in caught.value.problems}
        assert len(found) == len(caught.value.problems), "two problems with one key"
        return found

    return problems
