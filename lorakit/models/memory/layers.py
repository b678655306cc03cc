"""What can be told of a layer by looking at it."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn


def is_adaptable(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a layer is linear or a 2-D convolution that is ungrouped and padded with zeros, if at all."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)
