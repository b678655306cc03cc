"""The parts of FLUX.1 and Chroma, their blocks, and what LoRA files call their layers; imports no torch."""

from __future__ import annotations

from attrs import evolve

from lorakit.api.block_layout import BlockLayout
from lorakit.api.components import ModelPart
from lorakit.models.families.flow.checkpoint import TRANSFORMER as _NAME
from lorakit.models.families.sd import state_dict_keys as sd

TRANSFORMER = ModelPart(_NAME, title="transformer", lora_prefix="lora_unet_")
CLIP = evolve(sd.TEXT_ENCODER, title="text encoder (CLIP ViT-L)", lora_prefix="lora_te1_")
T5 = ModelPart("text_encoder_2", title="text encoder (T5)", encoders=(1,), lora_prefix="lora_te3_")
"""The second text encoder of FLUX.1."""
T5_ALONE = evolve(T5, name="text_encoder", encoders=(0,))
"""The only text encoder of Chroma."""

LAYOUT = BlockLayout(57, {"double": range(19), "single": range(19, 57)})
"""Blocks with weights for text and image each come first."""

LAYER_TAGS = ("transformer", "attention", "mlp", "modulation", "text_stream", "text_encoder")
"""All tags of layers that can be adapted."""

_GROUPS = {"double_blocks": "double", "single_blocks": "single"}


def transformer_key(path: str) -> str:
    """The name in LoRA files of a layer, by its path in the transformer."""
    return f"{TRANSFORMER.lora_prefix}{path.replace('.', '_')}"


def clip_key(path: str) -> str:
    """The name in LoRA files of a layer, by its path in CLIP's text encoder."""
    return f"{CLIP.lora_prefix}text_model_{path.replace('.', '_')}"


def t5_key(path: str) -> str:
    """The name in LoRA files of a layer, by its path in T5's encoder."""
    return f"{T5.lora_prefix}encoder_{path.replace('.', '_')}"


def block_index(path: str) -> int | None:
    """The number of a layer's block; None outside the numbered blocks."""
    blocks, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    numbers = LAYOUT.groups[_GROUPS[blocks]] if blocks in _GROUPS else range(0)
    return numbers[int(number)] if number.isdecimal() and int(number) < len(numbers) else None
