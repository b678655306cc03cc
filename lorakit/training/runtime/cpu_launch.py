"""Starting the processes that `accelerate launch --cpu --num_processes N` asks for and does not start.

On CPUs accelerate leaves starting processes to MPI; without an MPI host file it starts one
process, whatever N is, without a message. That process finds out here and starts the others.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

log = logging.getLogger(__name__)

_RANK_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def join_cpu_processes() -> None:
    """Start the other processes if accelerate was asked for several on CPUs and started this one alone."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # accelerate sets MASTER_ADDR when it is asked for more than one process.
    if not on_cpu or "MASTER_ADDR" not in os.environ or any(name in os.environ for name in _RANK_VARIABLES):
        return
    import psutil

    launcher = psutil.Process().parent()
    count = num_processes(launcher.cmdline()) if launcher is not None else None
    if count is None:
        log.warning("accelerate started one process only; to train on several CPU processes, give it --num_processes")
        return
    os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), RANK="0", LOCAL_RANK="0")
    for rank in range(1, count):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        atexit.register(_end, subprocess.Popen([sys.executable, "-m", "lorakit", *sys.argv[1:]], env=environment))  # noqa: S603


def num_processes(command: Sequence[str]) -> int | None:
    """The value of `--num_processes` in a command line; None if absent."""
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        name, _, value = argument.partition("=")
        if name.replace("-", "_") == "__num_processes" and (value or following).isdigit():
            return int(value or following)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that is finishing; end it if it does not."""
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
