"""Blocks that compute their activations again in the backward pass instead of keeping them.

Chen et al., 2016, arXiv:1604.06174, for some of a denoiser's blocks: those that keep the most bytes, as blocks that
see large images do, are worth the time of computing them twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recompute(blocks: Sequence[nn.Module], share: float = 1.0) -> None:
    """Let blocks keep nothing but their inputs for the backward pass, where they run again.

    With a share below 1, only that share of the blocks does so, rounded up: those that keep the most. How much that is
    shows when they first run with gradients; until then, each recomputes. The same blocks may be given another share.
    """
    choice = _Choice(share, len(blocks))
    for block in blocks:
        # Another class for the same object, so that its path and whatever else is known of it stay.
        if not isinstance(block, _Recomputing):
            block.__class__ = _recomputing(type(block))  # type: ignore[arg-type]
        cast("_Recomputing", block)._choice = choice


def bytes_kept(block: nn.Module, run: Callable[[], object], inputs: Sequence[object]) -> int:
    """Bytes that calling `run`, which runs a block, keeps for the backward pass; its weights and inputs do not count.

    Draws no random numbers that others would miss.
    """
    own = [*block.parameters(), *block.buffers(), *(tensor for tensor in inputs if isinstance(tensor, Tensor))]
    without = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(block.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type),
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        _output = run()  # held until all is counted, so that no address is given out twice
    return sum(size for address, size in kept.items() if address not in without)


class _Choice:
    """Which of some blocks recompute."""

    def __init__(self, share: float, blocks: int) -> None:
        self.number = math.ceil(share * blocks)
        self.is_all = self.number >= blocks
        self.kept: dict[nn.Module, int] = {}
        """Bytes that blocks would keep, for those that have run."""

    def __contains__(self, block: nn.Module) -> bool:
        return self.is_all or block in sorted(self.kept, key=self.kept.__getitem__, reverse=True)[: self.number]


class _Recomputing(nn.Module):
    """What recomputing blocks do before all else."""

    _choice: _Choice

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, choice = super().__call__, self._choice
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        recomputes = self in choice
        if not choice.is_all and self not in choice.kept:
            choice.kept[self] = bytes_kept(self, partial(run, *args, **kwargs), (*args, *kwargs.values()))
            recomputes = True
        return checkpoint(run, *args, use_reentrant=False, **kwargs) if recomputes else run(*args, **kwargs)


@cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks of a kind that recompute."""
    return type(kind.__name__, (_Recomputing, kind), {"__module__": kind.__module__})
