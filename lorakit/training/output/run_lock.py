"""One run at a time for each output name: the second is refused at its start.

The operating system holds the lock for as long as the process lives, so a run that was killed leaves nothing
that needs to be cleaned up.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from lorakit.config.train_config import OutputSection
from lorakit.errors import OutputError

log = logging.getLogger(__name__)

_LOCKED_BYTES = 1
"""Where the text in the lock's file begins; Windows lets nobody read the first byte of a file that is locked."""


@contextmanager
def run_lock(output: OutputSection) -> Iterator[None]:
    """Keep other runs from writing files of this name to this folder while the block lasts.

    Where the file system has no locks, a warning is logged. Raises OutputError, which names the other run.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    path = output.dir / f".{output.name}.lock"
    lock = FileLock(path)
    try:
        output.dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        _describe_holder(path)
    except Timeout as error:
        # Such a lock is no more than a file, which outlives the run that made it.
        if isinstance(lock, SoftFileLock):
            _warn(output, "its file system has no locks")
        else:
            raise OutputError(_refusal(output, path)) from error
    except (OSError, NotImplementedError) as error:
        _warn(output, getattr(error, "strerror", None) or str(error))
    try:
        yield
    finally:
        if lock.is_locked:
            # While it is held, so that no other run can have taken it.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                lock.release(force=True)


def _describe_holder(path: Path) -> None:
    """Write into the lock's file who holds it; it is held all the same where that cannot be written."""
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    with suppress(OSError), path.open("r+b") as file:
        file.seek(_LOCKED_BYTES)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())


def _refusal(output: OutputSection, path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(_LOCKED_BYTES)
            holder = file.read(200).decode(errors="replace").strip()
    except OSError:
        holder = ""
    return (
        f"output.name: another run is writing {output.name!r} to {output.dir}: {holder or 'an unknown process'}. "
        "Wait for its end or stop it, or give this run another output.name or output.dir."
    )


def _warn(output: OutputSection, reason: str) -> None:
    log.warning(
        "%s cannot be locked (%s): take care that no other run writes %r there at the same time",
        output.dir, reason, output.name,
    )  # fmt: skip
