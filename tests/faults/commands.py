"""lorakit's command in processes of its own, to be killed and waited for.

Most are forked from one process that has imported PyTorch already: what they do is the command's own code from its
first line on, and a start costs a tenth. Others are plain `python -m lorakit`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from tests.faults.injection import Fault, Injection

PRELOADED = [
    "pytest", "attrs", "PIL.Image", "PIL.PngImagePlugin", "scipy.integrate", "lorakit.training.setup", "torch._dynamo",
    "lorakit.previews.previews", "lorakit.data.images.augmentation", "transformers.models.clip.modeling_clip",
    "diffusers.models.autoencoders.autoencoder_kl", "transformers.optimization", "bitsandbytes", "dadaptation",
    "lion_pytorch",
]  # fmt: skip
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


@frozen
class SmallDisk:
    """A disk of its own for a folder, which no other process sees."""

    folder: Path
    size: int
    """Bytes."""
    copy: Path
    """Where what is in the folder is copied to when the command is over."""


@frozen
class Attempt:
    """A command that was started."""

    pid: int
    poll: Callable[[], int | None]
    """The exit status, negative where a signal ended it; None while it runs."""
    log: Path
    """What it says, on standard output and standard error."""
    operations: Path
    """Its operations on files, a line for each; absent for a command that was not forked."""

    def send(self, signal_number: int) -> None:
        """Send a signal, unless it has ended already."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.pid, signal_number)

    def wait(self, seconds: float = 300) -> int:
        """The exit status, once it has ended. Raises TimeoutError where it takes too long."""
        self.until(lambda: False, seconds)
        return int(self.poll() or 0)

    def until(self, reached: Callable[[], bool], seconds: float = 300) -> bool:
        """Wait until something is so or the command has ended; whether it still runs."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if reached():
                return True
            if time.monotonic() > deadline:
                os.kill(self.pid, 9)
                raise TimeoutError(self.said)
            time.sleep(0.004)
        return False

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def has_saved(self) -> bool:
        """Whether it has said that it saved a file, which it says with the time; not that it will."""
        return re.search(r"^\d\d:\d\d:\d\d saved ", self.said, re.MULTILINE) is not None

    @property
    def cpu_seconds(self) -> float:
        """For how long it has computed: other than a clock, the same on a busy machine."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            return float("inf")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_forked(
    arguments: Sequence[object], folder: Path, faults: Sequence[Fault] = (), disk: SmallDisk | None = None
) -> Attempt:
    """Start lorakit with these arguments in a folder, to which its log is written."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    log = _log(folder)
    operations = log.with_suffix(".operations")
    strings = [str(argument) for argument in arguments]
    process = context.Process(target=_run, args=(strings, log, operations, tuple(faults), disk))
    process.start()
    return Attempt(int(process.pid or 0), lambda: process.exitcode, log, operations)


def start_plain(arguments: Sequence[object], folder: Path) -> Attempt:
    """Start `python -m lorakit` with these arguments in a folder, to which its log is written."""
    log = _log(folder)
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)
    return Attempt(process.pid, process.poll, log, log.with_suffix(".operations"))


def _log(folder: Path) -> Path:
    """A log that is not there yet."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    return logs / f"{len(list(logs.glob('*.log'))):03d}.log"


def _run(arguments: list[str], log: Path, operations: Path, faults: tuple[Fault, ...], disk: SmallDisk | None) -> None:
    """What the forked process does."""
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(log.parent.parent)
    if disk:
        mount(disk.folder, disk.size)
    Injection(faults, os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_APPEND)).install()
    sys.argv = ["lorakit", *arguments]
    try:
        runpy.run_module("lorakit", run_name="__main__", alter_sys=True)
    finally:
        if disk:
            shutil.copytree(disk.folder, disk.copy)


def mount(folder: Path, size: int) -> None:
    """Put a disk of so many bytes in memory into a folder, for this process alone. Raises OSError where not allowed."""
    system, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    folder.mkdir(parents=True, exist_ok=True)
    flags = _CLONE_NEWNS if user == 0 else _CLONE_NEWNS | _CLONE_NEWUSER
    if system.unshare(flags):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    private, recursive = 1 << 18, 1 << 14
    system.mount(b"none", b"/", None, private | recursive, None)
    if system.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "no disk in memory")
