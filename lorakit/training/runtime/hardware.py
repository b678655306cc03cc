"""What can be said of the machine without torch, which takes seconds to import."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from attrs import frozen

from lorakit.config.train_config import TrainingSection
from lorakit.errors import Problem

_SIGNS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri")
"""What the drivers of NVIDIA, AMD and Intel, and Windows' driver for Linux, leave on Linux."""

_TOOLS = {"NVIDIA": ("nvidia-smi",), "AMD": ("rocminfo", "amd-smi"), "Intel": ("xpu-smi",)}
"""Programs that are installed with what a GPU of each maker needs to compute."""

BUILDS: Mapping[str, str] = {"NVIDIA": "CUDA", "AMD": "ROCm", "Intel": "Intel GPUs", "Apple": "Apple GPUs"}
"""What PyTorch is built for, by the maker of the GPU."""

GET_PYTORCH = "https://pytorch.org/get-started/locally/"


@frozen
class TorchBuild:
    """The PyTorch that is installed."""

    version: str
    """Its version: `2.13.0+cpu`."""
    gpus: str = ""
    """What it was built for besides CPUs, one of the values of `BUILDS`; empty where that is nothing."""


@cache
def torch_build() -> TorchBuild | None:
    """The PyTorch that is installed, read from its files; None where they do not say it."""
    spec = find_spec("torch")
    try:
        text = (Path(spec.origin or "").parent / "version.py").read_text(encoding="utf-8") if spec else ""
    except OSError:
        return None
    found = dict(re.findall(r"^(\w+)(?:: *[^=]+)? = '([^']*)'", text, re.MULTILINE))
    if "__version__" not in found:
        return None
    if sys.platform == "darwin":
        return TorchBuild(found["__version__"], "Apple GPUs" if platform.machine() == "arm64" else "")
    builds = {"hip": "ROCm", "cuda": "CUDA", "xpu": "Intel GPUs"}
    return TorchBuild(found["__version__"], next((builds[key] for key in builds if found.get(key)), ""))


def installed_gpu() -> str | None:
    """The maker of a GPU that this machine is set up to compute on; None where nothing shows that there is one."""
    if Path("/proc/driver/nvidia/version").exists():
        return "NVIDIA"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "Apple"
    return next((maker for maker, tools in _TOOLS.items() if any(map(shutil.which, tools))), None)


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


def built_for_another() -> Problem | None:
    """A warning where the machine has a GPU that the installed PyTorch was not built for."""
    maker, build = installed_gpu(), torch_build()
    if maker is None or build is None or build.gpus == BUILDS[maker]:
        return None
    alone = f"for {build.gpus}" if build.gpus else "for CPUs alone"
    message = f"there is an {maker} GPU, but PyTorch {build.version} was built {alone}, so this run is on the CPU"
    return Problem("training.device", message, f"install a build for {BUILDS[maker]}: {GET_PYTORCH}")


def hardware_warnings(training: TrainingSection) -> tuple[Problem, ...]:
    """What does not suit the machine, as far as it is sure without torch."""
    found: list[Problem | None] = []
    if training.device == "cpu":
        found.append(fp16_on_cpu(training, 'training.device is "cpu"'))
    if training.device == "auto":
        found.append(built_for_another())
        if not accelerator_in_sight():
            found.append(fp16_on_cpu(training, "no accelerator was found"))
    return tuple(doubt for doubt in found if doubt)
