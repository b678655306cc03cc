"""All of a safetensors file at once: for files that a run reads again and again, as it does whatever it saves."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor


def safetensors_content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata. Raises OSError or SafetensorError."""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    # Not tensor by tensor through `safe_open`, as each of those leaves some bytes behind.
    return safetensors.torch.load(path.read_bytes()), metadata
