"""Which of `cuda_graphs`, `channels_last` and `compile` a run uses: as its config says, or as measured for `"auto"`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping
from math import prod
from textwrap import shorten

from lorakit.config.train_config import TrainingSection
from lorakit.data.batch_sampler import buckets
from lorakit.data.loader import Batch
from lorakit.models.interfaces import DiffusionModel
from lorakit.models.memory.compile import compile_unsupported_reason
from lorakit.training.run import Run
from lorakit.training.step.cuda_graphs import CudaGraphStep, ForwardBackward, restore_after

log = logging.getLogger(__name__)

MIN_SECONDS = {"cuda_graphs": 20.0, "channels_last": 20.0, "compile": 900.0}
"""By key of `[training]`, how long a run must still take for a trial to pay, in the order in which keys are tried.

Compiling takes minutes. Graphs come first, as without them the device may wait for Python whatever else is faster.
"""

MIN_SPEEDUP = 1.03
"""How many times faster steps must get for a key to be switched on; less may be chance."""

TIMED = 3
"""How often a micro-batch is timed; the fastest counts."""


def compile_step(run: Run) -> ForwardBackward:
    """What computes a micro-batch: the run's own function, its CUDA graphs, or the fastest for keys set to `"auto"`."""
    training = run.config.training
    if training.cuda_graphs == "auto" and run.processes.device.type == "cuda" and training.excludes_graphs:
        log.info("training.cuda_graphs is off: %s", training.excludes_graphs)
    if open_keys(run):
        return Autotuner(run, run.forward_backward)
    return _forward_backward(run, run.forward_backward, requested(training))


def open_keys(run: Run) -> tuple[str, ...]:
    """The keys of `"auto"` that a measurement is to decide; elsewhere than on CUDA there are no graphs to measure."""
    training = run.config.training
    is_off = training.excludes_graphs or run.processes.device.type != "cuda"
    keys = [key for key in MIN_SECONDS if getattr(training, key) == "auto"]
    return tuple(key for key in keys if not (key == "cuda_graphs" and is_off))


def requested(training: TrainingSection) -> tuple[str, ...]:
    """The keys that the config switches on."""
    return tuple(key for key in MIN_SECONDS if getattr(training, key) is True)


def set_up_model(model: DiffusionModel, switched_on: Collection[str], compile_backend: str) -> None:
    """Switch memory format and compilation of a model on or off."""
    model.use_channels_last("channels_last" in switched_on)
    model.compile(compile_backend if "compile" in switched_on else None)


def _forward_backward(run: Run, forward_backward: ForwardBackward, switched_on: Collection[str]) -> ForwardBackward:
    """The function, or its CUDA graphs."""
    run.uses_cuda_graphs = "cuda_graphs" in switched_on
    if not run.uses_cuda_graphs:
        return forward_backward
    accumulators = run.gradients.buffer, run.loss
    return CudaGraphStep(forward_backward, accumulators, run.gradients.parameters, largest_latents(run))


def largest_latents(run: Run) -> tuple[int, ...]:
    """The shape [B, C, h, w] of the latents in this process's largest micro-batches."""
    rank, count = run.processes.rank, run.processes.world_size
    shapes = []
    for bucket in buckets(run.loader.datasets, count):
        images = min(bucket.batch_size, bucket.appearances)
        own = images * (rank + 1) // count - images * rank // count
        shapes.append((own, *run.model.latent_shape(*bucket.size)))
    return max(shapes, key=prod)


class Autotuner:
    """A `ForwardBackward` with those keys of `"auto"` on with which the first micro-batch is fastest.

    Measuring adds nothing to gradients and loss, and trains nothing. Each process chooses for itself: the keys change
    only how it computes, and a process that has no part of a micro-batch could not take part.
    """

    def __init__(
        self, run: Run, forward_backward: ForwardBackward, min_seconds: Mapping[str, float] = MIN_SECONDS
    ) -> None:
        """`min_seconds` says how long the run must still take for each key to be tried, in that order."""
        self._run = run
        self._forward_backward = forward_backward
        self._training = run.config.training
        self._keys = open_keys(run)
        self._min_seconds = min_seconds
        self._chosen: ForwardBackward | None = None

    def __call__(self, batch: Batch) -> None:
        """Add a micro-batch's loss and gradients."""
        if self._chosen is None:
            self._chosen = self._fastest(batch)
        self._chosen(batch)

    def _fastest(self, batch: Batch) -> ForwardBackward:
        """The function with the keys that pay. An error without any of those set to `"auto"` is raised."""
        last = best = requested(self._training)
        chosen: ForwardBackward | None
        chosen, shortest = self._measured(best, batch)
        log.info("a micro-batch takes %.1f ms", 1000 * shortest)
        for key in self._min_seconds:
            if key not in self._keys:
                continue
            if reason := self._skip_reason(key, shortest):
                log.info("training.%s is off: %s", key, reason)
                continue
            last, chosen = (*best, key), None  # graphs captured before are gone
            try:
                chosen, seconds = self._measured(last, batch)
            except Exception as error:  # compilers and drivers raise all kinds of exceptions
                seconds, text = math.inf, shorten(f"{type(error).__name__}: {error}", 300)
                log.info("%s failed: %s", " and ".join(last), text)
            pays = seconds * MIN_SPEEDUP < shortest
            on, times = "on" if pays else "off", (1000 * seconds, 1000 * shortest)
            log.info("training.%s is %s: %.1f ms with it, %.1f ms without", key, on, *times)
            if pays:
                best, shortest = last, seconds
        return chosen if chosen is not None and last == best else self._set_up(best)

    def _skip_reason(self, key: str, seconds: float) -> str:
        """Why a key is not tried, where a micro-batch takes this long without it; empty if it is."""
        left = (self._run.schedule.total_steps - self._run.step) * self._training.gradient_accumulation_steps * seconds
        if left < self._min_seconds[key]:
            return f"the run takes {left:.0f} s, too little for a trial to pay"
        device = self._run.processes.device
        return compile_unsupported_reason(self._training.compile_backend, device) if key == "compile" else ""

    def _measured(self, switched_on: Collection[str], batch: Batch) -> tuple[ForwardBackward, float]:
        """The function with these keys, and its seconds for a micro-batch, after one that compiles and allocates."""
        forward_backward, times = self._set_up(switched_on), []
        with restore_after((self._run.gradients.buffer, self._run.loss)):
            forward_backward(batch)
            for _ in range(TIMED):
                self._run.processes.synchronize()
                started = time.perf_counter()
                forward_backward(batch)
                self._run.processes.synchronize()
                times.append(time.perf_counter() - started)
        return forward_backward, min(times)

    def _set_up(self, switched_on: Collection[str]) -> ForwardBackward:
        """The function with these keys, and the model with it."""
        set_up_model(self._run.model, switched_on, self._training.compile_backend)
        return _forward_backward(self._run, self._forward_backward, switched_on)
