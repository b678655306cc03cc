"""The parts of Z-Image, their blocks, and what LoRA files call their layers; imports no torch."""

from __future__ import annotations

from lorakit.api.block_layout import BlockLayout
from lorakit.api.components import ModelPart
from lorakit.models.families.flow.checkpoint import TRANSFORMER as _NAME

TRANSFORMER = ModelPart(_NAME, title="transformer", lora_prefix="lora_unet_")

LAYOUT = BlockLayout(34, {"layers": range(30), "noise_refiner": range(30, 32), "context_refiner": range(32, 34)})
"""The main blocks come first, as all that most networks adapt."""
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""How Qwen3's chat template puts one message of a user, with thinking enabled; its tokens count in a caption's."""


def transformer_key(path: str) -> str:
    """The name in sd-scripts' words of a layer, by its path in the transformer."""
    return f"{TRANSFORMER.lora_prefix}{path.replace('.', '_')}"


def block_index(path: str) -> int | None:
    """The number of a layer's block; None outside the numbered blocks."""
    group, _, rest = path.partition(".")
    numbers, index = LAYOUT.groups.get(group), rest.partition(".")[0]
    return numbers[int(index)] if numbers and index.isdecimal() and int(index) < len(numbers) else None
