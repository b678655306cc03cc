"""TF32: whether CUDA may round the factors of float32 products to 10 bits, which its matrix units take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def products_rounded(allowed: bool, device: torch.device) -> Iterator[None]:
    """Let float32 products and convolutions on a CUDA device use TF32, or not; afterwards it is as it was.

    PyTorch by itself lets convolutions use it, and matrix products not.
    """
    # The older of PyTorch's two ways to say so: its compiler still reads that one, and fails where both were used.
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn] if device.type == "cuda" else []
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = allowed
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value
