"""The processes of one run: which this is, on which device, and how they speak to each other.

Launching is accelerate's (`accelerate launch -m lorakit train …`); alone, nothing of it is imported.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from attrs import frozen
from torch import Tensor

from lorakit.engine.cpu_launch import join_cpu_processes
from lorakit.errors import ConfigError, Problem


@frozen
class Processes:
    """The place of one process among those of the run."""

    device: torch.device
    """Where this process computes."""
    rank: int = 0
    """Its number, from 0."""
    world_size: int = 1
    """How many there are."""

    @classmethod
    def launched(cls, device: str, timeout: float | None = None) -> Processes:
        """The processes as the launcher made them, on a device by name, or the best one for `auto`.

        `timeout` is how many minutes they wait for each other. Raises ConfigError when the device is not there.
        """
        join_cpu_processes()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
            state = PartialState(cpu=on_cpu, **({"timeout": timedelta(minutes=timeout)} if timeout else {}))
            return cls(state.device, state.process_index, state.num_processes)
        return cls(_single_device(device))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def finish(self) -> None:
        """Return when this process's device has done all that it was asked for."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, summed in place over all processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def _single_device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return torch.device(accelerator or "cpu")
    if name != "cpu" and (accelerator is None or accelerator.type != name):
        found = f"this machine has {accelerator.type}" if accelerator else "this machine has no accelerator"
        raise ConfigError([Problem("training.device", f"{name!r} is not available: {found}", 'use "auto" or "cpu"')])
    return torch.device(name)
