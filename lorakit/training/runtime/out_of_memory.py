"""What to report when a run is out of memory, or short of it: the step, the batch, and what to change."""

from __future__ import annotations

import logging
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import evolve

from lorakit.api.observer import Observer, StepMetrics
from lorakit.config.memory_presets import next_preset, preset_diff, to_toml
from lorakit.config.train_config import UNIFIED_MEMORY_DEVICES
from lorakit.data.batch_sampler import SampleRef
from lorakit.errors import OutOfMemory, is_out_of_memory
from lorakit.training.output.folder import save_with_fallback
from lorakit.training.run import Run
from lorakit.training.runtime.precision import half_precision

log = logging.getLogger(__name__)

_PATIENCE = 3
"""Readings with a sign of full memory before it is reported: a new size of images may cause one."""
_DRIVERS_SHARE = 2**29
"""Bytes of a card's memory that the driver takes."""


@contextmanager
def explain_oom(run: Run, save_state: Callable[[Path | None], Path]) -> Iterator[None]:
    """Turn a lack of memory in a step into an `OutOfMemory` that says what to change; a state is saved if possible.

    All that a state holds is consistent until the step's update begins.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # to free the memory for writing the state
        images, width, height = _largest_batch(run)
        batch = f"{images} image{'s' if images > 1 else ''} of {width}x{height}"
        message = f"Out of memory in step {run.step + 1}, with a batch of {batch}. To need less, {memory_hint(run)}."
        raise OutOfMemory(f"{message}{_saved_state(run, save_state)}") from error


def memory_hint(run: Run) -> str:
    """What to set so that steps need less memory, the end of a sentence."""
    training = run.config.training
    if run.processes.device.type in UNIFIED_MEMORY_DEVICES:
        training = evolve(training, device="cpu")
    preset, ways = next_preset(training, run.parts_in_memory), []
    if training.mixed_precision == "no":
        ways.append(f'set mixed_precision = "{half_precision(run.processes.device.type)}" in [training]')
    if preset is not None:
        keys = {key: value for key, value in preset_diff(preset, training).items() if value != getattr(training, key)}
        ways.append(f"set {' and '.join(to_toml(keys))} in [training]")
    if run.uses_cuda_graphs:
        ways.append("set cuda_graphs = false in [training]")
    if _largest_batch(run)[0] > 1:
        ways.append("lower data.batch_size")
    ways.append("lower data.resolution")
    return f"{', or '.join(ways)}; `lorakit plan` shows what fits"


def _largest_batch(run: Run) -> tuple[int, int, int]:
    """Images of this process's largest micro-batch in the next step, or else the first one, and their sides."""
    plan = next(run.schedule.plans_from(run.step), None) or next(run.schedule.plans_from(0))

    def size(items: Sequence[SampleRef]) -> tuple[int, int, int]:
        example = run.loader.datasets[items[0].dataset].examples[items[0].example]
        return len(items), *example.placement.bucket

    shares = plan.shares(run.processes.rank, run.processes.world_size)
    return max((size(share.items) for share in shares), key=lambda found: found[0] * found[1] * found[2])


def _saved_state(run: Run, save_state: Callable[[Path | None], Path]) -> str:
    """A sentence about the state that was saved; empty where nothing is lost, or nothing can be saved."""
    if not run.state_is_consistent or not run.processes.is_main or run.step == run.first_step:
        return ""
    try:
        saved = save_with_fallback(save_state, run.config.output.name)
    except Exception as error:  # whatever it is, lack of memory is what must be reported
        log.warning("the state after step %d could not be saved: %s", run.step, error)
        return ""
    resume = f"--resume {saved.path}" if saved.refusal else "--resume"
    return (
        f" The state after step {run.step} is in {saved.path}; run the same command with {resume} to continue,"
        " with gradient_checkpointing or stream_base changed as you like."
    )


class MemoryPressureMonitor(Observer):
    """Looks for signs of full memory whenever the numbers of steps are read, and reports them once.

    It asks PyTorch's allocator, so the device is not waited for.
    """

    def __init__(self, signs: Iterator[str], hint: Callable[[], str]) -> None:
        """`signs` gives what is seen now, empty if nothing; `hint` what to change, as the end of a sentence."""
        self._signs = signs
        self._hint = hint
        self._left = _PATIENCE

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Look, unless it was reported already."""
        sign = next(self._signs) if self._left else ""
        if not sign:
            return
        self._left -= 1
        if not self._left:
            log.warning("step %d: %s, which slows every step down. To need less, %s", metrics.step, sign, self._hint())


def cuda_pressure(device: torch.device) -> Iterator[str]:
    """Signs of full memory on a CUDA device since the last time, as the beginning of a sentence; empty if none."""
    total, retries = torch.cuda.get_device_properties(device).total_memory, 0
    while True:
        stats = torch.cuda.memory_stats(device)
        before, retries = retries, stats.get("num_alloc_retries", 0)
        reserved = stats.get("reserved_bytes.all.current", 0)
        if spills_silently() and reserved + _DRIVERS_SHARE > total:
            yield "the GPU's memory is full, and the driver uses CPU RAM"
        elif retries > before:
            yield "the GPU's memory is full, and PyTorch's cached memory has to be freed and allocated again"
        else:
            yield ""


def spills_silently() -> bool:
    """Whether the GPU's driver continues in CPU RAM when the GPU's memory is full, as it does on Windows."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()
