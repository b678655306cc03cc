"""The output folder: one run at a time for each output name, and where to save when it cannot be written.

The operating system holds the lock for as long as the process lives, so a run that was killed leaves nothing
that needs to be cleaned up.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from attrs import frozen

from lorakit.config.train_config import OutputSection
from lorakit.errors import NotSaved, OutputError

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
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        # It is held all the same where the text that says who holds it cannot be written.
        with suppress(OSError), path.open("r+b") as file:
            file.seek(_LOCKED_BYTES)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    except Timeout as error:
        # Such a lock is no more than a file, which outlives the run that made it.
        if isinstance(lock, SoftFileLock):
            _warn(output, "its file system has no locks")
        else:
            try:
                with path.open("rb") as file:
                    file.seek(_LOCKED_BYTES)
                    holder = file.read(200).decode(errors="replace").strip()
            except OSError:
                holder = ""
            holder = holder or "an unknown process"
            raise OutputError(
                f"output.name: another run is writing {output.name!r} to {output.dir}: {holder}. "
                "Wait for its end or stop it, or give this run another output.name or output.dir."
            ) from error
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


def _warn(output: OutputSection, reason: str) -> None:
    log.warning(
        "%s cannot be locked (%s): take care that no other run writes %r there at the same time",
        output.dir, reason, output.name,
    )  # fmt: skip


@frozen
class Saved:
    """Where something was saved."""

    path: Path
    refusal: str = ""
    """Why it is not in its usual place; empty where it is."""


def save_with_fallback(save: Callable[[Path | None], Path], name: str) -> Saved:
    """Save something in its usual place, or else in a new folder in the current or the temporary directory.

    `save` is given the folder, None for the usual one. Raises NotSaved where none can be written.
    """
    try:
        return Saved(save(None))
    except OutputError as error:
        refusal = str(error)
    for place in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
        except OSError:
            continue
        try:
            return Saved(save(folder), refusal)
        except OutputError:
            folder.rmdir()
    raise NotSaved(refusal)
