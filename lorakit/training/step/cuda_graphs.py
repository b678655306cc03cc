"""Micro-batches replayed: what one of them makes the device do is recorded once for each shape, and then repeated.

On CUDA a recording is a CUDA graph, which the device runs by itself, so that the time is gone in which Python would ask
for each of its thousands of kernels. Elsewhere it is the work itself, done again on the same tensors.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from attrs import frozen
from torch import Tensor

from lorakit.data.loader import Batch

log = logging.getLogger(__name__)

Learn = Callable[[Batch], None]
"""Adds what a micro-batch on the device contributes to a step, its loss and its gradients, to tensors that stay."""

Work = Callable[[], None]

WARM_UPS = 3
"""How often work is done before it is recorded: libraries choose kernels, and tensors that stay are made."""

MAX_SHAPES = 64
"""How many shapes are recorded; each recording takes some megabytes, beside the memory that all of them share."""


class Recorder(Protocol):
    """A way to do the same work again and again, on the same tensors."""

    def warm_up(self, work: Work) -> None:
        """Do the work as it is done before a recording."""
        ...

    def record(self, work: Work) -> Work:
        """What does the work again when it is called; recording need not do it. RuntimeError where it cannot be."""
        ...


class Repetition:
    """Calls the work: for devices that record nothing."""

    def warm_up(self, work: Work) -> None:
        """Call it."""
        work()

    def record(self, work: Work) -> Work:
        """The work itself."""
        return work


class CudaGraphs:
    """CUDA graphs that take the memory of what comes and goes within them from one pool.

    They may share it, as none of them leaves anything there that is read after it has run.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        """Do the work on the stream that it will be recorded on."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Replays a graph of the work; nothing of it is done yet."""
        graph = torch.cuda.CUDAGraph()
        # Batches are pinned, and images encoded, in another thread meanwhile, so the mode is that of this thread alone.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        # The outer one: a capture that fails leaves its stream the current one.
        with torch.cuda.stream(self._stream), capture:
            work()
        return graph.replay


def recorder_for(device: torch.device) -> Recorder:
    """How to record on a device."""
    return CudaGraphs(device) if device.type == "cuda" else Repetition()


@frozen
class CapturedGraph:
    """Work that was recorded, and the micro-batch that it works on."""

    inputs: Sequence[Tensor]
    """The tensors of that micro-batch."""
    repeat: Work

    def replay(self, batch: Batch) -> None:
        """Do the work on a micro-batch of the same shape."""
        for own, new in zip(self.inputs, batch.tensors.values(), strict=True):
            own.copy_(new, non_blocking=True)
        self.repeat()


class CudaGraphStep:
    """A `Learn` that is recorded at the first micro-batch of each shape, and replayed from then on.

    What it does may depend on nothing but the micro-batch's tensors, and tensors that stay where they are in memory.
    Where that is seen not to be so, and for shapes beyond the most, it is called as usual, and the log says why.
    """

    def __init__(self, learn: Learn, sums: Sequence[Tensor], trained: Sequence[Tensor], recorder: Recorder) -> None:
        """`sums` are the tensors that are added to, `trained` those that an optimizer changes."""
        self._learn = learn
        self._sums = sums
        self._trained = trained
        self._places = _places(trained)
        self._recorder = recorder
        self._recordings: dict[Hashable, CapturedGraph | None] = {}
        """By shape; None for what cannot be recorded."""
        self._told: set[str] = set()

    def __call__(self, batch: Batch) -> None:
        """Add what a micro-batch contributes."""
        recording = self._recording(batch)
        if recording is None:
            self._learn(batch)
        else:
            recording.replay(batch)

    def _recording(self, batch: Batch) -> CapturedGraph | None:
        """What was recorded for micro-batches of this one's shape, now if there is nothing yet; None for none."""
        if _places(self._trained) != self._places:
            self._warn("what is trained has moved in memory, so nothing is replayed any more")
            return None
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.tensors.items())
        if shape not in self._recordings:
            if len(self._recordings) >= MAX_SHAPES:
                self._warn(f"micro-batches of {MAX_SHAPES} shapes are recorded; those of others are not")
                return None
            self._recordings[shape] = self._recorded(batch)
        return self._recordings[shape]

    def _recorded(self, batch: Batch) -> CapturedGraph | None:
        """A recording of this micro-batch, which itself does not count yet."""
        own = batch.clone()
        work = partial(self._learn, own)
        with restore_after(self._sums):
            if _draws(partial(self._warm_up, work), batch.latents.device):
                self._warn("nothing is recorded, because something draws from a random generator")
                return None
            try:
                return CapturedGraph(tuple(own.tensors.values()), self._recorder.record(work))
            except RuntimeError as error:
                shape = " × ".join(map(str, batch.latents.shape))
                self._warn(f"micro-batches of {shape} cannot be recorded: {' '.join(str(error).split())}")
                return None

    def _warm_up(self, work: Work) -> None:
        for _ in range(WARM_UPS):
            self._recorder.warm_up(work)

    def _warn(self, why: str) -> None:
        """Say why something is not replayed, once."""
        if why not in self._told:
            self._told.add(why)
            log.warning("training.cuda_graphs: %s", why)


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@contextmanager
def restore_after(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors back the numbers that they had."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)


def _draws(work: Work, device: torch.device) -> bool:
    """Whether some work draws from a generator whose state moves along, which it then has not done."""
    devices = [device] if device.type != "cpu" else []
    python = random.getstate()
    with torch.random.fork_rng(devices, device_type=device.type):
        before = _states(device)
        work()
        drawn = any(not torch.equal(old, new) for old, new in zip(before, _states(device), strict=True))
    drawn = drawn or random.getstate() != python
    random.setstate(python)
    return drawn


def _states(device: torch.device) -> list[Tensor]:
    """The states of PyTorch's generators."""
    module: Any = torch.get_device_module(device)
    return [torch.get_rng_state(), *([] if device.type == "cpu" else [module.get_rng_state(device)])]
