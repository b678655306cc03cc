"""Writing files so that they are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO
from uuid import uuid4

from lorakit.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that takes the place of `path` when the block ends well; else nothing changes.

    It is written beside `path`, flushed to the disk and renamed. Missing folders are made.
    Raises `OutputError` where the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # Makes the rename outlast a power cut, where the system can.
        with suppress(OSError):
            flush_to_disk(path.parent)
    except OSError as error:
        _discard(temporary)
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {reason}. Free some space or choose another folder.") from error
    except BaseException:
        _discard(temporary)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there. Raises `OutputError` where the system refuses."""
    with replacing(path) as file:
        file.write(content)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError where the system cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why_unwritable(folder: Path) -> str | None:
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


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
