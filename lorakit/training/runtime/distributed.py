"""The processes of one run: which this is, on which device, and how they communicate.

Launching is accelerate's (`accelerate launch -m lorakit train …`); alone, nothing of it is imported.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor

from lorakit.errors import ConfigError, LorakitError, Problem
from lorakit.training.runtime.cpu_launch import join_cpu_processes
from lorakit.training.runtime.device import check_device, find_device

T = TypeVar("T")


@frozen
class Distributed:
    """The place of one process among those of the run."""

    device: torch.device
    """Where this process computes."""
    rank: int = 0
    """Its number, from 0."""
    world_size: int = 1
    """How many there are."""

    @classmethod
    def init(cls, device: str, timeout: float | None = None) -> Distributed:
        """The processes as the launcher made them, on a device by name, or the best one for `auto`.

        `timeout` is how many minutes they wait for each other. Raises ConfigError when the device is not there
        or cannot be used, or the processes were started in a way in which they cannot train.
        """
        join_cpu_processes()
        _refuse_lone_tasks()
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        processes = _join(device, timeout) if several else cls(find_device(device))
        if processes.device.index is not None and processes.device.type != "cpu":
            # What is done without naming a device, such as recording and pinning, is then done on this one.
            torch.get_device_module(processes.device).set_device(processes.device)
        check_device(processes.device)
        return processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Return when all processes have come here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def synchronize(self) -> None:
        """Wait until this process's device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each process, by rank; all must call this.

        Raises on all processes what it raises on one: on others than that one as a LorakitError if it is one there.
        """
        if self.world_size == 1:
            return [work()]
        result, error = None, None
        try:
            own = work()
            pickle.dumps(own)  # so that an error in pickling is raised on all processes, too
            result = own
        except Exception as raised:  # of any kind, so that the others need not wait
            error = raised
        failure = None if error is None else (isinstance(error, LorakitError), f"{type(error).__name__}: {error}")
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, (result, failure))
        if error is not None:
            raise error
        for rank, (_, other) in enumerate(found):
            if other is not None:
                is_known, text = other
                raise (LorakitError if is_known else RuntimeError)(f"rank {rank} failed: {text}")
        return [given for given, _ in found]

    def all_reduce_sum(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, summed in place over all processes; sent, and summed, in `dtype` if given."""
        if self.world_size > 1:
            sent = tensor if dtype is None else tensor.to(dtype)
            torch.distributed.all_reduce(sent)
            if sent is not tensor:
                tensor.copy_(sent)
        return tensor


def _refuse_lone_tasks() -> None:
    """Raise ConfigError where Slurm has started several processes that know nothing of each other."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # set by srun alone, not in a batch script
    if "WORLD_SIZE" in os.environ or not tasks.isdigit() or int(tasks) < 2:
        return
    message = f"srun started {tasks} tasks, each of which would train all by itself and write the same files"
    hint = "give srun --ntasks-per-node=1 and let it start `torchrun` or `accelerate launch`, or --ntasks=1"
    raise ConfigError([Problem("", message, hint)])


def _join(device: str, timeout: float | None) -> Distributed:
    """Meet the other processes of the run. Raises ConfigError where that could only fail."""
    from accelerate import PartialState

    asked = int(os.environ["WORLD_SIZE"])
    on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    problems = [] if torch.distributed.is_initialized() else list(_problems_of_launch(device, on_cpu))
    if problems:
        raise ConfigError(problems)
    settings: dict[str, Any] = {"timeout": timedelta(minutes=timeout)} if timeout else {}
    if not on_cpu and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        # With it, NCCL need not guess the device, and reports its errors at once.
        settings["device_id"] = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    state = PartialState(cpu=on_cpu, **settings)
    if state.num_processes != asked:
        message = f"WORLD_SIZE is {asked}, but this process finds no other"
        raise ConfigError([Problem("", message, "start it with `accelerate launch` or torchrun, which set LOCAL_RANK")])
    # At the end of the program and not of the run: another run may follow, and processes can meet only once.
    atexit.register(state.destroy_process_group)
    # Not `cpu:0`: moving a tensor there copies it even if it is on `cpu`, memory-mapped weights included.
    own = torch.device("cpu") if state.device.type == "cpu" else state.device
    return Distributed(own, state.process_index, state.num_processes)


def _problems_of_launch(device: str, on_cpu: bool) -> Iterator[Problem]:
    """What is wrong with how the processes were started."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            hint = "give `accelerate launch` --multi_gpu, or answer `accelerate config` again"
            yield Problem("", f"accelerate is set up for {name}, which lorakit does not train with", hint)
    if ":" in device:
        yield Problem("training.device", f"{device!r} is one device, but each process needs another", 'use "auto"')
    if on_cpu or not torch.cuda.is_available():
        return
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > count:
        hint = f"give `accelerate launch` --num_processes {count}" if count > 1 else "start one process"
        yield Problem("", f"{local} processes were started on a machine with {count} GPU{'s' * (count > 1)}", hint)
    if not torch.distributed.is_nccl_available():
        message = "several processes need NCCL on GPUs, and this PyTorch has none (on Windows none has)"
        yield Problem("", message, "train on one GPU, or on Linux; WSL will do")
