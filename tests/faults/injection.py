"""Faults in a process's files: its n-th operation on files of some folder fails, waits, or is its last.

Operations are seen by an audit hook, and `os.fsync` by a function in its place, so lorakit's own code is as it is.
A disk that is full is a limit on the size of files, which the system heeds for every library's writes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from errno import EIO
from pathlib import Path
from typing import Literal

from attrs import field, frozen

_AUDITED = {"os.rename": "rename", "os.mkdir": "mkdir", "os.remove": "remove", "os.rmdir": "remove"}
_WRITING = os.O_WRONLY | os.O_RDWR


@frozen(kw_only=True)
class Fault:
    """What goes wrong with operations on files whose path holds `part`."""

    part: str
    do: Literal["kill", "tear", "refuse", "fill", "wait"]
    """`kill` ends the process before the operation, and `tear` in the first write to a file after it, at `bytes`;
    `refuse` fails it with `errno`; `fill` lets no file grow beyond `bytes`; `wait` takes `seconds`."""
    first: int = 0
    """Number of the operation that is the first to be hit."""
    count: int = 1_000_000
    """How many are hit, one after the other."""
    operations: tuple[str, ...] = ("open", "rename", "mkdir", "remove", "fsync")
    """Which operations are counted."""
    errno: int = EIO
    bytes: int = 0
    seconds: float = 0.0


@frozen
class Injection:
    """The faults of this process, and a record of its operations on files that are written."""

    faults: tuple[Fault, ...]
    record: int
    """Descriptor of the file that operations are written to, a line for each."""
    seen: dict[int, int] = field(factory=dict)
    """How many operations each fault has counted."""

    def install(self) -> None:
        """Watch this process from now on."""
        real_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            self.meet("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            real_fsync(descriptor)

        os.fsync = fsync
        sys.addaudithook(self._audited)

    def meet(self, operation: str, path: str) -> None:
        """Record an operation and do to it what its faults say."""
        os.write(self.record, f"{operation} {path}\n".encode())
        for index, fault in enumerate(self.faults):
            if fault.part not in path or operation not in fault.operations:
                continue
            number = self.seen[index] = self.seen.get(index, -1) + 1
            if number == fault.first + fault.count and fault.do == "fill":
                _limit_files(None)
            if fault.first <= number < fault.first + fault.count:
                _strike(fault)

    def _audited(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, str) and (set(str(mode or "")) & set("wax+") or int(str(flags)) & _WRITING):
                self.meet("open", path)
        elif event in _AUDITED:
            self.meet(_AUDITED[event], _full_path(*arguments[1 if event == "os.rename" else 0 :]))


def _full_path(path: object, *others: object) -> str:
    """A path that an operation was given, with the folder whose descriptor came last; of a renaming, the new one."""
    folder = others[-1] if others else -1
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):  # noqa: PTH117
        return f"{Path(f'/proc/self/fd/{folder}').readlink()}/{text}"
    return text


def _strike(fault: Fault) -> None:
    match fault.do:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "tear":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            _limit_files(fault.bytes)
        case "fill":
            _limit_files(fault.bytes)
        case "wait":
            time.sleep(fault.seconds)
        case "refuse":
            raise OSError(fault.errno, os.strerror(fault.errno))


def _limit_files(size: int | None) -> None:
    """Let no file grow beyond so many bytes, or let them grow."""
    import resource  # not on Windows

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if size is None else size, hard))
