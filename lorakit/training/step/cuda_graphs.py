"""CUDA graphs: the kernels of a micro-batch are captured once for each shape, then replayed.

The device runs a graph by itself, which saves the time in which Python would launch thousands of kernels one by one.
Elsewhere than on CUDA a replay calls the function again, on the same tensors.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.data.loader import Batch

log = logging.getLogger(__name__)

ForwardBackward = Callable[[Batch], None]
"""Adds a micro-batch's loss and gradients to tensors that stay where they are."""

Work = Callable[[], None]

WARM_UPS = 3
"""How often a micro-batch is computed before its capture: libraries choose kernels and allocate persistent tensors."""

MAX_SHAPES = 64
"""How many shapes are captured; each graph takes some megabytes, besides the memory pool that all of them share."""


class CudaGraphStep:
    """A `ForwardBackward` that is captured at the first micro-batch of each shape, and replayed from then on.

    It may depend on nothing but the micro-batch's tensors and tensors that stay where they are in memory. Where that is
    seen not to hold, and for shapes beyond `MAX_SHAPES`, it is called as usual, and the log says why.
    """

    def __init__(
        self, forward_backward: ForwardBackward, accumulators: Sequence[Tensor], trained: Sequence[Tensor]
    ) -> None:
        """`accumulators` are the tensors that are added to, `trained` those that an optimizer changes."""
        self._forward_backward = forward_backward
        self._accumulators = accumulators
        self._trained = trained
        self._addresses = _addresses(trained)
        self._graphs: dict[Hashable, tuple[Batch, Work] | None] = {}
        """By shape, the captured micro-batch and what computes it again; None for what cannot be captured."""
        self._logged: set[str] = set()
        device = accumulators[0].device
        # Graphs may share one pool, as none of them leaves anything there that is read after it has run.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> None:
        """Add a micro-batch's loss and gradients."""
        graph = self._graph(batch)
        if graph is None:
            self._forward_backward(batch)
            return
        captured, replay = graph
        for static, new in zip(captured.tensors.values(), batch.tensors.values(), strict=True):
            static.copy_(new, non_blocking=True)
        replay()

    def warm_up(self, work: Work) -> None:
        """Do the work on the stream of the capture."""
        if self._stream is None:
            work()
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        """What does the work again; the capture itself computes nothing. Raises RuntimeError where it is impossible."""
        if self._stream is None:
            return work
        graph = torch.cuda.CUDAGraph()
        # Batches are pinned, and images encoded, in another thread meanwhile, so the mode is that of this thread alone.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        # The outer one: a capture that fails leaves its stream the current one.
        with torch.cuda.stream(self._stream), capture:
            work()
        return graph.replay

    def _graph(self, batch: Batch) -> tuple[Batch, Work] | None:
        """The graph for micro-batches of this one's shape, captured now if it is the first; None for none."""
        if _addresses(self._trained) != self._addresses:
            self._warn("parameters were reallocated, so CUDA graphs are disabled")
            return None
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.tensors.items())
        if shape not in self._graphs:
            if len(self._graphs) >= MAX_SHAPES:
                self._warn(f"micro-batches of {MAX_SHAPES} shapes are captured; those of other shapes are not")
                return None
            self._graphs[shape] = self._captured(batch)
        return self._graphs[shape]

    def _captured(self, batch: Batch) -> tuple[Batch, Work] | None:
        """A graph of this micro-batch, whose loss and gradients are not added yet."""
        static = batch.clone()
        work = partial(self._forward_backward, static)

        def warm_ups() -> None:
            for _ in range(WARM_UPS):
                self.warm_up(work)

        with restore_after(self._accumulators):
            if _draws(warm_ups, batch.latents.device):
                self._warn("nothing is captured, because something draws from a random generator")
                return None
            try:
                return static, self.capture(work)
            except RuntimeError as error:
                shape = " × ".join(map(str, batch.latents.shape))
                self._warn(f"micro-batches of {shape} cannot be captured: {' '.join(str(error).split())}")
                return None

    def _warn(self, reason: str) -> None:
        """Log once why something is not replayed."""
        if reason not in self._logged:
            self._logged.add(reason)
            log.warning("training.cuda_graphs: %s", reason)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@contextmanager
def restore_after(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the values of tensors after the block."""
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, before in zip(tensors, copies, strict=True):
            tensor.copy_(before)


def _draws(work: Work, device: torch.device) -> bool:
    """Do some work; whether it drew from a global random generator, whose state is restored."""
    modules: list[Any] = [torch.get_device_module(device)] if device.type != "cpu" else []
    python = random.getstate()

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(module.get_rng_state(device) for module in modules)]

    with torch.random.fork_rng([device for _ in modules], device_type=device.type):
        before = states()
        work()
        drawn = not all(map(torch.equal, before, states())) or random.getstate() != python
    random.setstate(python)
    return drawn
