"""The device of a run, in words."""

from __future__ import annotations

import torch

_FORMATS = {"no": "float32", "fp16": "fp16", "bf16": "bf16"}


def device_summary(device: torch.device, mixed_precision: str, world_size: int) -> str:
    """What a run computes on and in which number format: `NVIDIA H200, 139 GiB, bf16`."""
    words = [device.type.upper()]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        words = [properties.name, f"{properties.total_memory / 2**30:.0f} GiB"]
    processes = [f"{world_size} processes"] if world_size > 1 else []
    return ", ".join([*processes, *words, _FORMATS[mixed_precision]])
