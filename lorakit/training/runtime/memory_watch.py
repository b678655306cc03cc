"""Notices when a GPU's memory is full in a run that continues, only more slowly."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Iterator

import torch

from lorakit.api.observer import Observer, StepMetrics

log = logging.getLogger(__name__)

_PATIENCE = 3
"""Readings with a sign of it before it is reported: a new size of images may cause one."""
_DRIVERS_SHARE = 2**29
"""Bytes of a card's memory that the driver takes."""


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
