"""How images lie in memory: the channels of a pixel next to each other, or the pixels of a channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def use_channels_last(module: nn.Module, on: bool) -> None:
    """Keep the weights of all convolutions in a module with channels last in memory, or first.

    What a convolution puts out then lies so too. Weights that are made anew for each use stay as they are.
    """
    memory_format = torch.channels_last if on else torch.contiguous_format
    for layer in module.modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, nn.Conv2d) and weight is not None:
            weight.data = weight.data.contiguous(memory_format=memory_format)


def memory_format_of(image: Tensor) -> torch.memory_format:
    """How an image [B, C, h, w] lies in memory; with channels first where both can be said of it."""
    is_last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
