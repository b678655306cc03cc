"""What is done with LoRA files after training: looking into them, merging, resizing, extracting, baking, converting."""

from __future__ import annotations

from lorakit.lora_tools.average import average
from lorakit.lora_tools.bake import Baked, bake
from lorakit.lora_tools.convert import Converted, convert
from lorakit.lora_tools.extract import Extracted, extract
from lorakit.lora_tools.info import LoRAInfo, compare, info
from lorakit.lora_tools.merge import merge
from lorakit.lora_tools.output import Written
from lorakit.lora_tools.resize import resize

__all__ = [
    "Baked",
    "Converted",
    "Extracted",
    "LoRAInfo",
    "Written",
    "average",
    "bake",
    "compare",
    "convert",
    "extract",
    "info",
    "merge",
    "resize",
]
