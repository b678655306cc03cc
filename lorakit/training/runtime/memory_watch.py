"""Notices when memory has become short in a run that still goes on, only slowly."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lorakit.api.observer import Observer, StepMetrics

log = logging.getLogger(__name__)

_PATIENCE = 3
"""Readings with a sign of it before it is told: one is what a new size of images may bring along."""
_DRIVERS_SHARE = 2**29
"""Bytes that the driver takes of a card's memory."""
_MUCH_SWAP = 2**25
"""Bytes in the swap space that count as a sign of it."""
_MANY_FAULTS = 200
"""Times in a step that memory has to be read from the disk that count as a sign of it."""

Signs = Callable[[], str]
"""What shows now that memory is short, as the beginning of a sentence; empty where nothing does."""


class MemoryPressureMonitor(Observer):
    """Looks for signs that memory is short whenever the numbers of steps are read, and tells of them once.

    It asks the host alone, so the device is not waited for.
    """

    def __init__(self, signs: Signs, advice: Callable[[], str]) -> None:
        """`advice` gives what to change, as the end of a sentence."""
        self._signs = signs
        self._advice = advice
        self._left = _PATIENCE

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Look, unless it was told already."""
        sign = self._signs() if self._left else ""
        if not sign:
            return
        self._left -= 1
        if not self._left:
            told = f"{sign}, which slows every step down. To need less, {self._advice()}"
            log.warning("step %d: %s", metrics.step, told)


def pressure_probe(device: torch.device) -> Signs:
    """What to ask on a device."""
    found = _signs_of_cuda(device) if device.type == "cuda" else _signs_of_the_host()
    next(found)
    return lambda: next(found)


def _signs_of_cuda(device: torch.device) -> Iterator[str]:
    """Each time, what PyTorch's allocator shows; first of all, nothing."""
    total, retries = torch.cuda.get_device_properties(device).total_memory, 0
    while True:
        stats = torch.cuda.memory_stats(device)
        before, retries = retries, stats.get("num_alloc_retries", 0)
        reserved = stats.get("reserved_bytes.all.current", 0)
        if spills_silently() and reserved + _DRIVERS_SHARE > total:
            yield "the GPU's memory is full, and the driver uses the computer's"
        elif retries > before:
            yield "the GPU's memory is full, and what PyTorch keeps for later has to be given back and asked for anew"
        else:
            yield ""


def spills_silently() -> bool:
    """Whether the driver of the GPU goes on in the computer's memory when its own is full, as it does on Windows."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def _signs_of_the_host() -> Iterator[str]:
    """Each time, what the system says of this process; first of all, nothing."""
    swapped, faults = _swapped(), _faults()
    yield ""
    while True:
        before, faults = faults, _faults()
        if _swapped() - swapped > _MUCH_SWAP:
            yield "the computer's memory is full, and a part of this run's is swapped to the disk"
        elif faults - before > _MANY_FAULTS:
            yield "the computer's memory is short, and what this run needs is read from the disk again and again"
        else:
            yield ""


def _swapped() -> int:
    """Bytes of this process that are in the swap space; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSwap:")), 0)


def _faults() -> int:
    """How often this process has had to wait for its memory to be read from the disk; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
