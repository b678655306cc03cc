"""Channels-last (NHWC) memory format for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def use_channels_last(module: nn.Module, on: bool) -> None:
    """Convert the weights of all convolutions in a module to channels-last memory format, or to the default one.

    Their outputs then have it too. Quantized weights stay as they are.
    """
    memory_format = torch.channels_last if on else torch.contiguous_format
    for layer in module.modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, nn.Conv2d) and weight is not None:
            weight.data = weight.data.contiguous(memory_format=memory_format)


def memory_format_of(image: Tensor) -> torch.memory_format:
    """The memory format of an image [B, C, h, w]; the default one where it is contiguous in both."""
    is_last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
