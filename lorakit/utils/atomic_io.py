"""Writing files and folders so that they are either complete or not there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO
from uuid import uuid4

from lorakit.errors import OutputError

_LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room for a file."""
_STAGING = re.compile(r"\.partial-.+")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8,}\.tmp")
_STALE_SECONDS = 3600
"""Age from which a temporary file is taken for a killed process's; locking each would triple the time of a write."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that replaces `path` when the block ends without an error; else nothing changes.

    It is written beside `path`, flushed to the disk and renamed. Missing folders are made.
    Raises `OutputError` where the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        commit(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either complete or not there. Raises `OutputError` where the system refuses."""
    with atomic_write(path) as file:
        file.write(content)


@contextmanager
def staging_dir(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final` to write in, until `commit`; removed with what is left in it.

    It is locked for as long as the block lasts and the process lives. Missing folders are made.
    Raises `OutputError` where the system refuses.
    """
    from filelock import FileLock

    scratch = final.with_name(f".partial-{uuid4().hex[:8]}")
    lock = FileLock(scratch / _LOCK)
    try:
        with as_output_error(final):
            scratch.mkdir(parents=True)
            with suppress(NotImplementedError):  # some file systems have no locks
                lock.acquire(blocking=False)
        yield scratch
    finally:
        with suppress(OSError):
            lock.release(force=True)
        shutil.rmtree(scratch, ignore_errors=True)


def commit(written: Path, final: Path) -> None:
    """Give a complete file or folder in a staging folder beside `final` that name; what had it is removed.

    At each moment the old or the new one is there; a new folder may for a moment be called `NAME.new`.
    Raises `OutputError` where the system refuses.
    """
    with as_output_error(final):
        if written.is_dir():
            _replace_folder(written, final)
        else:
            written.replace(final)
        with suppress(OSError):
            flush_to_disk(final.parent)


def _replace_folder(written: Path, final: Path) -> None:
    """Rename a folder to `final`; no system replaces a folder that is not empty in one go."""
    scratch, waiting = written.parent, final.with_name(f"{final.name}.new")
    if waiting.exists():  # a process was killed between the renames below
        waiting.rename(scratch / "unneeded" if final.exists() else final)
    if final.exists():
        written.rename(waiting)
        final.rename(scratch / "old")
        written = waiting
    written.rename(final)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is left under its name. Raises `OutputError` where the system refuses."""
    with staging_dir(folder) as scratch, as_output_error(folder):
        folder.rename(scratch / folder.name)


def remove_stale_temp_files(folder: Path) -> None:
    """Remove what killed processes had begun to write in a folder; what others are writing stays."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink(missing_ok=True)
            elif _STAGING.fullmatch(path.name) and path.is_dir():
                _remove_unless_locked(path)


def _remove_unless_locked(staging: Path) -> None:
    from filelock import FileLock, SoftFileLock, Timeout

    lock = FileLock(staging / _LOCK)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError, NotImplementedError):
        return
    # Where the file system has no locks, nobody knows who is writing.
    if not isinstance(lock, SoftFileLock):
        shutil.rmtree(staging, ignore_errors=True)
    lock.release(force=True)


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Raise what the system refuses as an `OutputError` that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        cure = "Free some space or choose another folder" if error.errno in _FULL else "Choose another name or folder"
        raise OutputError(f"{path} cannot be written: {reason}. {cure}.") from error


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Raises OSError where the system cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable_reason(folder: Path) -> str | None:
    """Why no file can be made in a folder that may not exist yet; None where one can. Leaves no trace."""
    folder = folder.absolute()
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not existing.is_dir():
            return f"{existing} is a file, not a folder"
        with TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror or error}"
