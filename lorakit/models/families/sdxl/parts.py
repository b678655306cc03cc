"""The parts of Stable Diffusion XL, their blocks, and what LoRA files call their layers; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import evolve

from lorakit.api.block_layout import BlockLayout
from lorakit.api.components import ModelPart
from lorakit.models.families.sd import state_dict_keys as sd
from lorakit.models.families.sd.state_dict_keys import original_unet_name

UNET = sd.UNET
TEXT_ENCODER_1 = evolve(sd.TEXT_ENCODER, title="first text encoder (CLIP ViT-L)", lora_prefix="lora_te1_")
TEXT_ENCODER_2 = evolve(
    sd.TEXT_ENCODER,
    name="text_encoder_2",
    title="second text encoder (OpenCLIP ViT-bigG)",
    encoders=(1,),
    lora_prefix="lora_te2_",
)

STRUCTURE: Mapping[str, Any] = {
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "addition_embed_type": "text_time",
}
"""What the U-Nets of all SDXL models have in common, in the words of diffusers' configs."""

LAYOUT = BlockLayout(23, {"down": range(1, 10), "mid": range(10, 13), "up": range(13, 22)})
"""As sd-scripts has it: 1 + k for `input_blocks.k`, 10 + k for `middle_block.k`, 13 + k for `output_blocks.k`."""

SWAPPED_PATH = re.compile(r".*?\b(?:transformer_blocks|resnets|downsamplers|upsamplers)\.\d+")
"""Matches the path of a layer of the U-Net up to the block that is swapped as one.

A transformer of ten blocks has a seventh of the U-Net's weights, each of its blocks a seventieth.
"""

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.")
_FIRST = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def original_unet_path(path: str) -> str:
    """The path of a layer of the U-Net in the original code: `input_blocks.4.1.proj_in`."""
    return original_unet_name(f"{path}.weight", STRUCTURE).removesuffix(".weight")


def block_index(original_path: str) -> int | None:
    """The number of a layer's block; None outside the numbered blocks."""
    found = _BLOCK.match(original_path)
    return None if found is None else _FIRST[found[1]] + int(found[2])


def unet_key(path: str) -> str:
    """The name in LoRA files of a layer, by its path in the U-Net: the original code's path."""
    return f"{UNET.lora_prefix}{original_unet_path(path).replace('.', '_')}"


def text_encoder_key(part: ModelPart, path: str) -> str:
    """The name in LoRA files of a layer, by its path in one of the text encoders."""
    return f"{part.lora_prefix}text_model_{path.replace('.', '_')}"
