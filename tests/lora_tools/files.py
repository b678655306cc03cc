"""Small LoRA files, and their updates in float64 by the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PROJECTION = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONVOLUTION = "lora_unet_mid_block_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {ATTENTION: (12, 10), PROJECTION: (9, 10, 1, 1), CONVOLUTION: (8, 6, 3, 3), TEXT: (14, 7)}
"""Shapes of the weights of four layers of a Stable Diffusion 1.x that is very small."""
XL_SHAPES = {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": (12, 10),
             "lora_te2_text_model_encoder_layers_0_mlp_fc1": (14, 7)}  # fmt: skip

SD1 = {"ss_base_model_version": "sd_v1", "ss_v2": "False"}


def lora(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    rank: int = 4,
    alpha: float | None = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """A LoRA with random factors."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key, (out, *inputs) in shapes.items():
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, *inputs, generator=generator).to(dtype)
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(inputs[1:]), generator=generator).to(dtype)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return tensors


def dora(shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0, **options: object) -> Tensors:
    """A DoRA with random factors and magnitudes."""
    tensors = lora(shapes, seed=seed, **options)  # type: ignore[arg-type]
    for key, (out, *inputs) in shapes.items():
        magnitude = torch.rand(out, generator=torch.Generator().manual_seed(seed)) + 0.5
        tensors[f"{key}.dora_scale"] = magnitude.view(-1, 1, *[1] * len(inputs[1:]))
    return tensors


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] = SD1) -> Path:
    """A safetensors file."""
    save_file(tensors, path, metadata=dict(metadata))
    return path


def updates(tensors: Tensors) -> dict[str, Tensor]:
    """(alpha/rank)·U·D of each layer, float64, as a matrix."""
    found = {}
    for key in dict.fromkeys(name.partition(".")[0] for name in tensors):
        down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
        alpha = tensors.get(f"{key}.alpha", torch.tensor(float(len(down)))).double()
        found[key] = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
    return found


def updates_of(path: Path) -> dict[str, Tensor]:
    """The same of a file in sd-scripts' layout."""
    return updates(load_file(path))


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 1e-6) -> bool:
    """Whether updates are the same but for rounding, relative to their norms."""
    return one.keys() == other.keys() and all(
        (one[key] - other[key]).norm() <= tolerance * max(float(other[key].norm()), 1e-30) for key in one
    )


def error(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The norm of all differences relative to that of all updates."""
    differences = sum(float((one[key] - other[key]).square().sum()) for key in other)
    return math.sqrt(differences / sum(float(update.square().sum()) for update in other.values()))


def renamed(tensors: Tensors, name: Callable[[str], str]) -> Tensors:
    """The tensors by other names."""
    return {name(old): tensor for old, tensor in tensors.items()}
