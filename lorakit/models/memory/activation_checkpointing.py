"""Activation checkpointing: blocks recompute their activations in the backward pass instead of keeping them.

Chen et al., 2016, arXiv:1604.06174, for some of a denoiser's blocks: those that keep the most bytes, as blocks that
see large images do, are worth the time of computing them twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class CheckpointedBlock(nn.Module):
    """A block that keeps its activations for the backward pass, unless it is chosen to recompute them.

    What is recomputed is the call, not `forward`, so that a compiled block stays one graph.
    """

    selection: SelectiveCheckpointing | None = None
    """Which blocks recompute; None if none does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `forward` gives."""
        run, selection = super().__call__, self.selection
        if selection is None or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        if selection.is_open(self):
            selection.note(self, bytes_kept(self, partial(run, *args, **kwargs), (*args, *kwargs.values())))
        elif self not in selection:
            return run(*args, **kwargs)
        # Imports the compiler, which takes longer than all else that a run imports.
        from torch.utils.checkpoint import checkpoint

        # While a CUDA graph is captured, generators have no state that could be read or put back.
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        unknown = not captured and self not in selection.draws
        before = _generator_states(args) if unknown else []
        keeps_state = not captured and selection.draws.get(self, True)
        out = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=keeps_state, **kwargs)
        if unknown:
            selection.draws[self] = before != _generator_states(args)
        return out


def checkpointed_blocks(module: nn.Module) -> list[CheckpointedBlock]:
    """The blocks in a module that can recompute their activations."""
    return [block for block in module.modules() if isinstance(block, CheckpointedBlock)]


def checkpoint_blocks(blocks: Sequence[CheckpointedBlock], share: float = 1.0) -> None:
    """Let blocks keep nothing but their inputs for the backward pass, where they run again.

    With a share below 1, only that share of the blocks does so, rounded up: those that keep the most. How much that is
    shows when they first run with gradients; until then, each recomputes. The same blocks may be given another share.
    """
    selection = SelectiveCheckpointing(share, len(blocks))
    for block in blocks:
        block.selection = selection


def _generator_states(args: Sequence[object]) -> list[bytes]:
    """The states of PyTorch's own generators on the CPU and on the devices of these arguments."""
    from torch.utils.checkpoint import get_device_states

    # As bytes, since comparing tensors is an operation, which has no result where tensors are only imagined.
    return [state.numpy().tobytes() for state in (torch.get_rng_state(), *get_device_states(*args)[1])]


def bytes_kept(block: nn.Module, run: Callable[[], object], inputs: Sequence[object]) -> int:
    """Bytes that calling `run`, which runs a block, keeps for the backward pass; its weights and inputs do not count.

    Draws no random numbers that others would miss.
    """
    own = [*block.parameters(), *block.buffers(), *(tensor for tensor in inputs if isinstance(tensor, Tensor))]
    without = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Not its address, which tensors without memory have in common.
        kept[storage._cdata] = storage.nbytes()
        return tensor

    device = next(block.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        _output = run()  # held until all is counted, so that no storage takes another one's place
    return sum(size for storage, size in kept.items() if storage not in without)


class SelectiveCheckpointing:
    """Which of some blocks recompute."""

    def __init__(self, share: float, blocks: int) -> None:
        self.number = math.ceil(share * blocks)
        self.is_all = self.number >= blocks
        self.draws: dict[CheckpointedBlock, bool] = {}
        """Whether blocks draw from PyTorch's own generators, for those that have recomputed once.

        lorakit's own random numbers have keys instead of a state, but a network of a plugin may draw. To put states
        back for each block takes longer than some blocks.
        """
        self._kept: dict[CheckpointedBlock, int] = {}
        """Bytes that blocks would keep, for those that have run."""
        self._chosen: frozenset[CheckpointedBlock] = frozenset()

    def is_open(self, block: CheckpointedBlock) -> bool:
        """Whether it has to be seen first how much a block keeps."""
        return not self.is_all and block not in self._kept

    def note(self, block: CheckpointedBlock, size: int) -> None:
        """Take into account that a block would keep this number of bytes."""
        self._kept[block] = size
        self._chosen = frozenset(sorted(self._kept, key=self._kept.__getitem__, reverse=True)[: self.number])

    def __contains__(self, block: CheckpointedBlock) -> bool:
        return self.is_all or block in self._chosen
