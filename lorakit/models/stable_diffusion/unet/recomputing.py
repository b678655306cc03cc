"""Blocks that compute their activations again in the backward pass instead of keeping them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RecomputableBlock(nn.Module):
    """A block from tensors to a tensor that keeps its activations, unless it is told to recompute them.

    What is recomputed is the call, not `forward`, so that a compiled block stays one graph.
    """

    recomputes = False

    def __call__(self, *inputs: Tensor) -> Any:
        """What `forward` gives."""
        if not (self.recomputes and torch.is_grad_enabled()):
            return super().__call__(*inputs)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(super().__call__, *inputs, use_reentrant=False)


def recompute_blocks(unet: nn.Module) -> None:
    """Recompute the activations of a U-Net's ResNet and transformer blocks in the backward pass."""
    for module in unet.modules():
        if isinstance(module, RecomputableBlock):
            module.recomputes = True
