"""CUDA graphs: the kernels of a micro-batch are captured once for each shape, then replayed.

The device runs a graph by itself, which saves the time in which Python would launch thousands of kernels one by one.
Elsewhere than on CUDA a replay calls the function again, on the same tensors.
"""

from __future__ import annotations

import gc
import logging
import random
import traceback
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from lorakit.data.loader import Batch
from lorakit.errors import is_out_of_memory

log = logging.getLogger(__name__)

ForwardBackward = Callable[[Batch], None]
"""Adds a micro-batch's loss and gradients to tensors that stay where they are."""

Work = Callable[[], None]

WARM_UPS = 3
"""How often a micro-batch is computed before its capture: libraries choose kernels and allocate persistent tensors."""

MAX_SHAPES = 64
"""How many shapes are captured; each graph takes some megabytes, besides the memory pool that all of them share."""


class GraphMemory:
    """The stream that graphs are captured on, and the pool of memory that all of them share.

    One pool is enough, as no graph leaves anything there that is read after it has run. It lasts as long as its graphs.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is allocated yet."""
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self.holds_tensors = False
        """Whether what was last computed in `allocating` has left tensors in the pool."""
        self._device = torch.cuda.current_device() if device.index is None else device.index

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the pool, which is given back while neither this nor a graph uses it."""
        self._begin()
        self._end()
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Compute on the stream, with memory of the pool, also in the threads that autograd computes in."""
        torch.cuda.empty_cache()  # memory that steps before have left
        before = self._bytes_in_use()
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._begin()
            try:
                yield
            finally:
                self._end()
                self._release()
                current.wait_stream(self.stream)
        if self._bytes_in_use() > before:
            gc.collect()
        self.holds_tensors = self._bytes_in_use() > before

    def capture(self, work: Work) -> Work:
        """What replays the work, which is not done now. After an error nothing may be captured any more."""
        graph = torch.cuda.CUDAGraph()
        # Batches are pinned, and images encoded, in another thread meanwhile, so the mode is that of this thread alone.
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            # The outer one: a capture that fails leaves its stream the current one.
            with torch.cuda.stream(self.stream), capture:
                work()
        except BaseException:
            with suppress(RuntimeError):  # raised where the capture itself has ended its use of the pool
                self._end()
                self._release()
            raise
        return graph.replay

    def give_back(self, graphs: MutableMapping[Hashable, Any]) -> None:
        """Give the memory back, with the graphs that use it."""
        torch.cuda.synchronize(self._device)  # one of them may be running
        graphs.clear()
        torch.cuda.empty_cache()

    def _bytes_in_use(self) -> int:
        """Bytes of the pool that tensors hold now."""
        blocks = (block for segment in torch.cuda.memory_snapshot(self.pool) for block in segment["blocks"])  # type: ignore[no-untyped-call]
        return sum(block["size"] for block in blocks if block["state"] == "active_allocated")

    def _begin(self) -> None:
        """Count a use of the pool, and allocate from it what is computed on the current stream."""
        torch._C._cuda_beginAllocateCurrentStreamToPool(self._device, self.pool)

    def _end(self) -> None:
        """Allocate as usual; the use still counts."""
        torch._C._cuda_endAllocateToPool(self._device, self.pool)

    def _release(self) -> None:
        """Count a use of the pool no more."""
        torch._C._cuda_releasePool(self._device, self.pool)


class CudaGraphStep:
    """A `ForwardBackward` that is captured at the first micro-batch of each shape, and replayed from then on.

    It may depend on nothing but the micro-batch's tensors and tensors that stay where they are in memory. Where that is
    seen not to hold, or memory runs out, and for shapes beyond `MAX_SHAPES`, it is called as usual, and the log says
    why.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        accumulators: Sequence[Tensor],
        trained: Sequence[Tensor],
        largest: Sequence[int] = (),
    ) -> None:
        """`accumulators` are the tensors that are added to, `trained` those that an optimizer changes.

        `largest` is the largest shape of a micro-batch's latents, [B, C, h, w]. It is captured first, as what is
        captured then finds room in its memory.
        """
        self._forward_backward = forward_backward
        self._accumulators = accumulators
        self._trained = trained
        self._largest = largest
        self._addresses = _addresses(trained)
        self._graphs: dict[Hashable, tuple[Batch, Work]] = {}
        """By shape, the captured micro-batch and what computes it again."""
        self._captures = True
        """Whether further shapes are captured."""
        self._logged: set[str] = set()
        device = accumulators[0].device
        self._memory = GraphMemory(device) if device.type == "cuda" else None

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
        """Do the work as often as a capture needs it, where the capture will do it."""
        with self._memory.allocating() if self._memory else nullcontext():
            for _ in range(WARM_UPS):
                work()

    def capture(self, work: Work) -> Work:
        """What does the work again; the capture itself computes nothing. Raises RuntimeError where it is impossible."""
        return self._memory.capture(work) if self._memory else work

    def _graph(self, batch: Batch) -> tuple[Batch, Work] | None:
        """The graph for micro-batches of this one's shape, captured now if it is the first; None for none."""
        if (self._captures or self._graphs) and _addresses(self._trained) != self._addresses:
            self._stop("parameters were reallocated, so CUDA graphs are disabled")
        if self._captures and not self._graphs and prod(self._largest) > batch.latents.numel():
            self._add(batch.resized(self._largest))
        if self._captures and _shape(batch) not in self._graphs:
            if len(self._graphs) < MAX_SHAPES:
                self._add(batch)
            else:
                self._warn(f"micro-batches of {MAX_SHAPES} shapes are captured; those of other shapes are not")
        return self._graphs.get(_shape(batch))

    def _add(self, batch: Batch) -> None:
        """Capture micro-batches of this one's shape; its own loss and gradients are not added."""
        shape, is_warm, stop, skip = " × ".join(map(str, batch.latents.shape)), False, "", ""
        try:
            with restore_after(self._accumulators), self._memory.held() if self._memory else nullcontext():
                static = batch.clone()
                work = partial(self._forward_backward, static)
                if _draws(partial(self.warm_up, work), batch.latents.device):
                    skip = "nothing is captured, because something draws from a random generator"
                elif self._graphs and self._memory and self._memory.holds_tensors:
                    # A replay of the graphs that are there would overwrite them.
                    stop = f"micro-batches of {shape} leave tensors in the graphs' memory, so CUDA graphs are disabled"
                else:
                    is_warm = True
                    self._graphs[_shape(batch)] = static, self.capture(work)
        except Exception as error:
            # Where work is recorded, what is cleaned up after the first error may cause another.
            if is_out_of_memory(error) or is_out_of_memory(error.__context__ or error):
                stop = f"memory does not suffice to capture micro-batches of {shape}, so CUDA graphs are disabled"
            elif is_warm and isinstance(error, RuntimeError):
                skip = f"micro-batches of {shape} cannot be captured: {' '.join(str(error).split())}"
            else:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold activations
        # Only now are the error, and the memory that it holds, gone.
        if stop:
            self._stop(stop)
        elif skip:
            # What was captured stays; but a pool in which a capture failed may not take another.
            self._captures = False
            self._warn(skip)

    def _stop(self, reason: str) -> None:
        """Go on without graphs, and without the memory that they hold."""
        self._captures = False
        if self._memory is not None:
            self._memory.give_back(self._graphs)
        self._graphs.clear()
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        """Log once why something is not replayed."""
        if reason not in self._logged:
            self._logged.add(reason)
            log.warning("training.cuda_graphs: %s", reason)


def _shape(batch: Batch) -> Hashable:
    """What must be equal for a graph to compute a micro-batch."""
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.tensors.items())


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
