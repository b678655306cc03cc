"""A folder that a config can be checked against: a base model without weights worth the name, and one image."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorakit.config.reading import config_from_tables
from lorakit.config.sections import TrainConfig
from lorakit.errors import ConfigError
from lorakit.plugins import Catalog

Tables = dict[str, Any]

SD1_SHAPES = {
    "model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (32, 32, 3, 3),
    "model.diffusion_model.input_blocks.1.1.norm.weight": (32,),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (32, 32, 1, 1),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 16),
    "model.diffusion_model.out.2.weight": (4, 32, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (32, 3, 3, 3),
    "first_stage_model.encoder.down.0.block.0.conv1.weight": (32, 32, 3, 3),
    "first_stage_model.encoder.conv_out.weight": (8, 32, 3, 3),
    "first_stage_model.decoder.conv_out.weight": (3, 32, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (10, 16),
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 16),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (32, 16),
}
"""The tensors that tell a single-file Stable Diffusion 1.x, in their original names, and little else of it."""


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A safetensors file with zeros of these shapes in float16."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


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
