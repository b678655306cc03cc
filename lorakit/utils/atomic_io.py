"""Writing files and folders so that they are either whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO
from uuid import uuid4

from lorakit.errors import OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_LOCK_NAME = "lock"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8,}\.tmp|\.partial-.+")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that takes the place of `path` when the block ends well; else nothing changes.

    It is written beside `path`, flushed to the disk and renamed. Missing folders are made.
    Raises `OutputError` where the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{_unique()}.tmp")
    try:
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                _lock(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            # Makes the rename outlast a power cut, where the system can.
            with suppress(OSError):
                flush_to_disk(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there. Raises `OutputError` where the system refuses."""
    with atomic_write(path) as file:
        file.write(content)


@contextmanager
def staging_dir(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final` to write in, until `commit`; removed with what is left in it.

    Missing folders are made. Raises `OutputError` where the system refuses.
    """
    scratch = final.with_name(f".partial-{_unique()}")
    try:
        with as_output_error(final):
            scratch.mkdir(parents=True)
            lock = (scratch / _LOCK_NAME).open("wb")
        with lock:
            _lock(lock)
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def commit(written: Path, final: Path) -> None:
    """Give a file or folder, whole in a scratch folder beside `final`, that name; what had it goes.

    At each moment the old or the new one is there whole; a new folder may for a moment be called `NAME.new`.
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
        for path in [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]:
            if _is_locked(path):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Raise what the system refuses as an `OutputError` that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {reason}. Free some space or choose another folder.") from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError where the system cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable_reason(folder: Path) -> str | None:
    """Why no file can be made in a folder that may not be there yet; None where one can. Leaves no trace."""
    folder = folder.absolute()
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not existing.is_dir():
            return f"{existing} is a file, not a folder"
        with TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror or error}"


def _unique() -> str:
    return uuid4().hex[:8]


def _lock(file: IO[bytes]) -> None:
    """Lock a file for as long as it is open, which ends with the process, however that ends."""
    if fcntl:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_locked(path: Path) -> bool:
    """Whether a process is known to be writing a file or folder."""
    if not fcntl:
        return True
    try:
        with (path / _LOCK_NAME if path.is_dir() else path).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
