"""The number format that a run computes in: what its config says, or what suits its devices best for `"auto"`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from attrs import evolve, frozen

from lorakit.config.train_config import TrainConfig, TrainingSection
from lorakit.training.runtime.distributed import Distributed

Name = Literal["no", "fp16", "bf16"]
"""The values of `training.mixed_precision` that name a dtype."""

DTYPES: Mapping[Name, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What a run computes in, by `training.mixed_precision`, from what every device has to what few have."""

_BF16_CAPABILITY = (8, 0)
"""NVIDIA's GPUs from this compute capability on, that of Ampere, have units for bf16."""

_ROCM_WITHOUT_BF16 = re.compile("gfx(8|90[0-6]|10)")
"""AMD's GPUs before MI100 and the Radeon RX 7000 series."""


@frozen
class Precision:
    """A value of `training.mixed_precision`, and why it was chosen."""

    value: Name
    reason: str = ""
    """A few words; empty where there was no choice."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base model computes in."""
        return DTYPES[self.value]

    def __str__(self) -> str:
        name = "float32" if self.value == "no" else self.value
        return f"{name} (auto: {self.reason})" if self.reason else name


IMAGINED_GPU = Precision("bf16", "as on NVIDIA GPUs from compute capability 8.0 on; fp16, as on others, takes as much")
"""The precision to plan with for a GPU that is not there."""


def precision_of(training: TrainingSection, device: torch.device) -> Precision:
    """The precision of a run on a device.

    For `"auto"`, it is half precision only where training in it is known to work and to pay. PyTorch's own answer,
    `is_bf16_supported`, is yes where bf16 is emulated, which is slow and takes attention's fused kernels away.
    """
    if training.mixed_precision != "auto":
        return Precision(training.mixed_precision)
    if device.type == "cpu":
        return Precision("no")  # most have no units for half precision
    if device.type != "cuda":
        return Precision("no", f"half precision has not been tried on {device.type}")
    if torch.version.hip is not None:
        architecture = str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
        return Precision("fp16" if _ROCM_WITHOUT_BF16.match(architecture) else "bf16", architecture)
    capability = torch.cuda.get_device_capability(device)
    shown = "compute capability {}.{}".format(*capability)
    return Precision("bf16", shown) if capability >= _BF16_CAPABILITY else Precision("fp16", f"{shown}, below 8.0")


def common_precision(training: TrainingSection, processes: Distributed) -> Precision:
    """The precision of a run: for `"auto"` the first of float32, fp16 and bf16 that any of its devices needs."""
    own = precision_of(training, processes.device)
    if training.mixed_precision != "auto":
        return own
    counts = torch.tensor([float(value == own.value) for value in DTYPES], device=processes.device)
    counted = processes.all_reduce_sum(counts).tolist()
    least = next(value for value, count in zip(DTYPES, counted, strict=True) if count)
    return own if own.value == least else Precision(least, "another process's device has no other")


def run_precision(config: TrainConfig, processes: Distributed) -> Precision:
    """The precision of a run with its model: for `"auto"`, never fp16 where that overflows."""
    found = common_precision(config.training, processes)
    if found.value == "fp16" and config.model.overflows_fp16 and config.training.mixed_precision == "auto":
        return Precision("bf16", f"{found.reason}, which is slow; {config.model.title} overflows in fp16")
    return found


def with_precision(config: TrainConfig, precision: Precision) -> TrainConfig:
    """The config with this precision."""
    return evolve(config, training=evolve(config.training, mixed_precision=precision.value))


def half_precision(device: str) -> Literal["bf16", "fp16"]:
    """The half precision that suits a device, as a config names both, also one that is not there."""
    is_cuda = (device == "auto" or device.startswith("cuda")) and torch.cuda.is_available()
    chosen = precision_of(TrainingSection(), torch.device("cuda")).value if is_cuda else "bf16"
    return "fp16" if chosen == "fp16" else "bf16"
