"""Modes: ways to compute the same step, of which the fastest depends on the device, the model and the images."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from textwrap import shorten

from attrs import evolve, fields, frozen

from lorakit.config.train_config import TrainingSection
from lorakit.data.loader import Batch
from lorakit.models.interfaces import DiffusionModel
from lorakit.models.memory.compile import compile_unsupported_reason
from lorakit.training.run import Run
from lorakit.training.step.cuda_graphs import CudaGraphStep, Learn, recorder_for, restore_after
from lorakit.training.step.numerics import tf32_allowed

log = logging.getLogger(__name__)

LEAST_SECONDS = {"cuda_graphs": 20.0, "channels_last": 20.0, "compile": 900.0}
"""How long a run must still take for a trial of a mode to be worth its time, in the order in which they are tried.

Compiling takes minutes. Graphs come first, as without them the device may wait for Python whatever else is faster.
"""

LEAST_GAIN = 1.03
"""How many times faster a mode must be to be taken; what is less may be chance."""

TIMED = 3
"""How often a micro-batch is computed to take the time; the fastest counts."""


@frozen(kw_only=True)
class ExecutionMode:
    """What is switched on, by keys of `[training]`."""

    cuda_graphs: bool = False
    channels_last: bool = False
    compile: bool = False

    @classmethod
    def certain(cls, training: TrainingSection) -> ExecutionMode:
        """What the config asks for, without what it leaves open."""
        return cls(**{own.name: getattr(training, own.name) is True for own in fields(cls)})

    def set_up(self, model: DiffusionModel, compiler: str) -> None:
        """Let a model compute so; `compiler` is a backend of torch.compile."""
        model.use_channels_last(self.channels_last)
        model.compile(compiler if self.compile else None)

    def __str__(self) -> str:
        return " and ".join(own.name for own in fields(ExecutionMode) if getattr(self, own.name)) or "neither"


@contextmanager
def compile_step(run: Run, learn: Learn) -> Iterator[Learn]:
    """The function, computed as the config says for as long as this lasts; the model has been set up.

    What the config leaves open is found with the first micro-batch.
    """
    training = run.config.training
    is_open = any(getattr(training, key) == "auto" for key in LEAST_SECONDS)
    with tf32_allowed(training.tf32, run.processes.device):
        yield Autotuner(run, learn) if is_open else _computed(ExecutionMode.certain(training), run, learn)


class Autotuner:
    """A `Learn` in the fastest of the modes that a config leaves open, as measured with its first micro-batch.

    Measuring adds nothing to gradients and loss, and moves nothing that is trained. Each process chooses for itself: a
    mode changes only how it computes, and a process that has no share of a micro-batch could not take part.
    """

    def __init__(self, run: Run, learn: Learn, least_seconds: Mapping[str, float] = LEAST_SECONDS) -> None:
        """`least_seconds` says how long the run must still take for each mode to be tried, in that order."""
        self._run = run
        self._learn = learn
        self._training = run.config.training
        self._least_seconds = least_seconds
        self._chosen: Learn | None = None

    def __call__(self, batch: Batch) -> None:
        """Add what a micro-batch contributes."""
        if self._chosen is None:
            self._chosen = self._set_up(self._fastest(batch))
        self._chosen(batch)

    def _fastest(self, batch: Batch) -> ExecutionMode:
        """The mode to train in. What goes wrong without any of those that are open is raised."""
        best = ExecutionMode.certain(self._training)
        shortest = self._seconds(best, batch)
        log.info("a micro-batch takes %.1f ms", 1000 * shortest)
        for key in self._least_seconds:
            if getattr(self._training, key) != "auto":
                continue
            if reason := self._why_not(key, shortest):
                log.info("training.%s is off: %s", key, reason)
                continue
            mode = evolve(best, **{key: True})
            seconds = self._tried(mode, batch)
            pays = seconds * LEAST_GAIN < shortest
            log.info("training.%s is %s: %.1f ms with it", key, "on" if pays else "off", 1000 * seconds)
            if pays:
                best, shortest = mode, seconds
        return best

    def _why_not(self, key: str, seconds: float) -> str:
        """Why a mode is not worth a trial, where a micro-batch takes so many seconds without; empty if it is."""
        device = self._run.processes.device
        if key == "cuda_graphs" and device.type != "cuda":
            return f"{device.type} has none"
        left = (self._run.schedule.total_steps - self._run.step) * self._training.gradient_accumulation_steps * seconds
        if left < self._least_seconds[key]:
            return f"the run takes {left:.0f} s, too little for a trial to pay"
        return compile_unsupported_reason(self._training.compile_backend, device) if key == "compile" else ""

    def _tried(self, mode: ExecutionMode, batch: Batch) -> float:
        """Seconds of a micro-batch in this mode; infinitely many where it fails."""
        try:
            return self._seconds(mode, batch)
        except Exception as error:  # compilers and drivers raise all kinds of exceptions
            log.info("%s failed: %s", mode, shorten(f"{type(error).__name__}: {error}", 300))
            return math.inf

    def _seconds(self, mode: ExecutionMode, batch: Batch) -> float:
        """Seconds of a micro-batch in this mode, when all is made that the first one makes."""
        learn, times = self._set_up(mode), []
        with restore_after((self._run.gradients.buffer, self._run.loss)):
            learn(batch)
            for _ in range(TIMED):
                self._run.processes.finish()
                started = time.perf_counter()
                learn(batch)
                self._run.processes.finish()
                times.append(time.perf_counter() - started)
        return min(times)

    def _set_up(self, mode: ExecutionMode) -> Learn:
        """The function in this mode, and the model with it. Recordings of other modes are gone."""
        mode.set_up(self._run.model, self._training.compile_backend)
        return _computed(mode, self._run, self._learn)


def _computed(mode: ExecutionMode, run: Run, learn: Learn) -> Learn:
    """The function, called as it is or replayed."""
    if not mode.cuda_graphs:
        return learn
    sums = run.gradients.buffer, run.loss
    return CudaGraphStep(learn, sums, run.gradients.parameters, recorder_for(run.processes.device))
