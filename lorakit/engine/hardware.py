"""What can be said of the machine without torch, which takes seconds to import."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lorakit.config.sections import TrainingSection
from lorakit.errors import Problem

_SIGNS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri")
"""What the drivers of NVIDIA, AMD and Intel, and Windows' own for Linux, leave on Linux."""


def accelerator_in_sight() -> bool:
    """Whether there may be an accelerator. Only False is sure: then no driver of any has left a trace."""
    if not sys.platform.startswith("linux"):
        return True
    return any(Path(sign).exists() for sign in _SIGNS) or shutil.which("nvidia-smi") is not None


def fp16_on_cpu(training: TrainingSection, because: str) -> Problem | None:
    """A warning where fp16 meets a CPU, which is known `because` of something."""
    if training.mixed_precision != "fp16":
        return None
    message = f'{because}, and "fp16" is slow on a CPU and may lack kernels'
    return Problem("training.mixed_precision", message, 'use "no", or "bf16" for less memory')


def doubts(training: TrainingSection) -> Problem | None:
    """What does not suit the machine, as far as it is sure without torch."""
    if training.device == "cpu":
        return fp16_on_cpu(training, 'training.device is "cpu"')
    if training.device == "auto" and not accelerator_in_sight():
        return fp16_on_cpu(training, "no accelerator was found")
    return None
