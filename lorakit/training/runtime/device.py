"""The device of a run: its name, whether PyTorch can use it, and what does not suit it."""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

import torch

from lorakit.config.train_config import TrainingSection
from lorakit.errors import ConfigError, OutOfMemory, Problem, is_out_of_memory
from lorakit.training.runtime.hardware import GET_PYTORCH, built_for_another, installed_gpu, torch_build

_OTHER_VERSIONS = "https://pytorch.org/get-started/previous-versions/"
_KINDS = {"cuda": ("CUDA", "ROCm"), "xpu": ("Intel GPUs",), "mps": ("Apple GPUs",)}
"""What PyTorch must be built for, by kind of device."""
_CHOOSING_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_NO_KERNELS = re.compile("no kernel image|kernel image is invalid|invalid device function|_ARCH_MISMATCH")
"""Errors of CUDA, ROCm and their libraries where a build has no code for a GPU."""


def find_device(name: str) -> torch.device:
    """The device that a config names, or the best one for `auto`. Raises ConfigError where it does not exist."""
    kind, _, number = name.partition(":")
    with _without_warnings():
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        count = torch.accelerator.device_count() if accelerator else 0
    if kind == "auto":
        return torch.device(accelerator.type if accelerator else "cpu")
    if kind != "cpu" and (accelerator is None or accelerator.type != kind):
        raise ConfigError([_not_available(name)])
    if number and int(number) >= count:
        known = " and ".join(f'"{kind}:{index}"' for index in range(count))
        raise ConfigError([Problem("training.device", f"{name!r} is not available: there is only {known}")])
    return torch.device(name)


def check_device(device: torch.device) -> None:
    """Compute something small. Raises ConfigError where PyTorch cannot use the device, OutOfMemory if it is full."""
    try:
        with _without_warnings():
            ones = torch.ones(16, 16, device=device)
            (ones @ ones).sum().item()
    except Exception as error:  # drivers and libraries raise exceptions of many kinds
        if is_out_of_memory(error):
            raise OutOfMemory(f"{device} has no memory left before anything is read: other programs use it") from error
        raise ConfigError([_not_usable(device, error)]) from error


def device_summary(device: torch.device, precision: str, world_size: int = 1) -> str:
    """The device of a run, `NVIDIA GeForce RTX 4090, 24 GB, bf16`, and in a second sentence what it does not use."""
    if device.type == "cpu":
        processes = f"{world_size} processes, " if world_size > 1 else ""
        with _without_warnings():
            has_gpu = torch.accelerator.is_available()  # which could have been chosen
        build, finds = torch_build(), f". PyTorch {torch.__version__} finds no GPU that it can use"
        if build is not None and not build.gpus:
            finds = f". PyTorch {torch.__version__} cannot use a GPU; if you have one: {GET_PYTORCH}"
        return f"CPU, {processes}{precision}{'' if has_gpu else finds}"
    parts = [_name(device), precision]
    if device.type in ("cuda", "xpu"):  # others share the CPU's memory
        total: int = torch.get_device_module(device).get_device_properties(device).total_memory
        parts.insert(1, f"{round(total / 2**30)} GB")  # as makers round it
    if world_size > 1:
        return f"{world_size} processes, each on: {', '.join(parts)}"
    count = torch.accelerator.device_count()
    launch = f"accelerate launch --num_processes {count} -m lorakit train …"
    return ", ".join(parts) + (f". 1 of {count} GPUs is used; `{launch}` for all" if count > 1 else "")


def rank_summary(device: torch.device, world_size: int) -> str:
    """Where one of several processes computes, and its share: `cuda:1 (NVIDIA H200) of node3, 1/2 of each batch`."""
    name = "CPU" if device.type == "cpu" else f"{device} ({_name(device)})"
    return f"{name} of {platform.node()}, 1/{world_size} of each batch"


def device_warnings(training: TrainingSection, device: torch.device) -> Iterator[Problem]:
    """What does not suit the device, or keeps PyTorch from a better one, as far as it takes PyTorch to see it."""
    if device.type == "cpu" and training.device == "auto" and built_for_another() is None:
        chosen = {name: os.environ[name] for name in _CHOOSING_GPUS if name in os.environ}
        hidden = any(value.strip() in ("", "-1") for value in chosen.values())  # which is how to say: on the CPU
        if installed_gpu() is not None and not hidden:
            reason, hint = _cause(chosen)
            yield Problem("training.device", f"this run is on the CPU: {reason}", hint)
    if device.type == "cuda" and torch.version.hip is None and training.mixed_precision == "bf16":
        # PyTorch's own answer, is_bf16_supported, is yes where bf16 is emulated.
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            has = f"{_name(device)} has no units for bf16 (compute capability {major}.{minor}, below 8.0)"
            message = f'"bf16" is slow here and takes much more memory in attention: {has}'
            yield Problem("training.mixed_precision", message, 'use "fp16"')
    if device.type == "cuda" and torch.version.hip is not None:
        variable = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
        architecture = _architecture(device)
        # Names of data centres' GPUs begin with gfx9; for those the kernels are finished.
        if architecture.startswith("gfx1") and os.environ.get(variable) != "1":
            name = f"{_name(device)} ({architecture})"
            message = f"PyTorch may count fast attention on {name} as experimental, and not use it"
            yield Problem("training.device", message, f"if steps are slow, set the environment variable {variable}=1")


def _cause(chosen: dict[str, str]) -> tuple[str, str]:
    """Why PyTorch finds no GPU though it was built for one, and what helps."""
    error, version = _driver_error(), torch.__version__
    if found := re.search(r"too old \(found version (\d+)\)", error):
        has = f"CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
        hint = f"update the driver: https://www.nvidia.com/drivers, or install a PyTorch for {has}: {GET_PYTORCH}"
        return f"the NVIDIA driver is for {has}, PyTorch {version} for CUDA {torch.version.cuda}", hint
    if chosen:
        settings = ", ".join(f"{name}={value}" for name, value in chosen.items())
        return f"PyTorch {version} finds no GPU with {settings}", "GPUs are counted from 0"
    if sys.platform == "darwin":
        return f"PyTorch {version} finds no GPU that it can use", "macOS 14 or later is needed"
    because = f": {error}" if error else ""
    hint = "see whether the driver's tool, such as nvidia-smi, shows one"
    return f"PyTorch {version} finds no GPU that it can use{because}", hint


def _driver_error() -> str:
    """PyTorch's error when it cannot start CUDA or ROCm; empty where it was built for neither."""
    try:
        with _without_warnings():
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except AssertionError:  # not built for it
        return ""
    except Exception as error:  # drivers raise exceptions of many kinds
        return shorten(str(error).partition(". ")[0], 200)
    return ""


def _not_available(name: str) -> Problem:
    """The problem of a device that a config names and that does not exist."""
    build = torch_build()
    if build is not None and build.gpus not in _KINDS[name.partition(":")[0]]:
        message = f"{name!r} is not available: PyTorch {torch.__version__} was built without it"
        return Problem("training.device", message, f'{GET_PYTORCH}, or set "cpu"')
    reason, hint = _cause({name: os.environ[name] for name in _CHOOSING_GPUS if name in os.environ})
    return Problem("training.device", f"{name!r} is not available: {reason}", f'{hint}; or set "cpu"')


def _not_usable(device: torch.device, error: Exception) -> Problem:
    """The problem of a device that exists, and fails at its first computation."""
    reason = shorten(str(error).partition("\n")[0], 200)
    if device.type != "cuda" or not _NO_KERNELS.search(reason):
        hint = 'another program may hold it; or set "cpu"'
        return Problem("training.device", f"{device} cannot be used: {reason}", hint)
    kernels = torch.cuda.get_arch_list()
    name = f"{_name(device)} ({_architecture(device)})"
    message = f"PyTorch {torch.__version__} has no kernels for {name}, only for {', '.join(kernels)}"
    if torch.version.hip is not None:
        return Problem("training.device", message, 'set "cpu", or use another GPU')
    major, minor = torch.cuda.get_device_capability(device)
    newest = max((int(number) for number in re.findall(r"sm_(\d+)", " ".join(kernels))), default=0)
    other = "a newer PyTorch" if 10 * major + minor > newest else "a PyTorch for an older CUDA, such as 12.6"
    return Problem("training.device", message, f'install {other}: {_OTHER_VERSIONS}, or set "cpu"')


def _name(device: torch.device) -> str:
    if device.type == "mps":
        return torch.backends.mps.get_name() if hasattr(torch.backends.mps, "get_name") else "Apple GPU"
    return str(torch.get_device_module(device).get_device_name(device))


def _architecture(device: torch.device) -> str:
    """What kernels are compiled for: `gfx1100`, `compute capability 6.1`."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide PyTorch's warnings about drivers and GPUs: the callers report what matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
