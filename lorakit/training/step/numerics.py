"""How a device computes: TF32 or not, the same bytes each time or not, and the fastest convolutions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import deterministic

from lorakit.errors import ConfigError, Problem

if TYPE_CHECKING:
    from lorakit.training.run import Run

_PRECISION = {True: "tf32", False: "ieee"}
"""How PyTorch's newer settings call what is allowed, or not."""

MIN_PER_SHAPE = 500
"""Micro-batches of each shape that a run must have for timing its convolutions to pay; it takes about a second."""


@contextmanager
def numerics_of(run: Run) -> Iterator[None]:
    """Let the device compute as the config of a run says, and its convolutions as fast as they can."""
    training, device = run.config.training, run.processes.device
    repeats = run.schedule.micro_batches_per_shape >= MIN_PER_SHAPE
    with (
        tf32_allowed(training.tf32, device),
        cudnn_benchmark(_has_cudnn(device) and repeats and not training.deterministic),
    ):
        yield


def _has_cudnn(device: torch.device) -> bool:
    # On AMD GPUs the same setting makes MIOpen search, which can take minutes.
    return device.type == "cuda" and torch.version.hip is None


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms for each new shape and keep the fastest, or not; afterwards it is as it was."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def tf32_allowed(allowed: bool, device: torch.device) -> Iterator[None]:
    """Let float32 products and convolutions on a CUDA device use TF32, or not; afterwards it is as it was.

    TF32 rounds their factors to 10 bits, which the matrix units take. PyTorch by itself lets convolutions use it, and
    matrix products not.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    value: bool | str = allowed
    settings, key = [backends.cuda.matmul, backends.cudnn], "allow_tf32"
    try:
        before = [getattr(setting, key) for setting in settings]
    except RuntimeError:
        # PyTorch has two ways to say so, of which its compiler still reads the older one; where a program has used
        # the newer one, the older fails.
        settings, key, value = [backends.cuda.matmul, backends.cudnn.conv], "fp32_precision", _PRECISION[allowed]
        before = [getattr(setting, key) for setting in settings]
    for setting in settings:
        setattr(setting, key, value)
    try:
        yield
    finally:
        for setting, former in zip(settings, before, strict=True):
            setattr(setting, key, former)


@contextmanager
def deterministic_mode(required: bool) -> Iterator[None]:
    """Let PyTorch use only operations that give the same bytes each time, if that is required; then as it was before.

    Raises ConfigError where it has none for what is to be computed.
    """
    if not required:
        yield
        return
    # cuBLAS reads this when it is first used; without it, the order of additions varies.
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    untyped: Any = deterministic
    mode, filling = torch.get_deterministic_debug_mode(), untyped.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    untyped.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        problem = f"cannot be had with this config: {str(error).partition(',')[0]}"
        raise ConfigError([Problem("training.deterministic", problem, "set it to false")]) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        untyped.fill_uninitialized_memory = filling
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
