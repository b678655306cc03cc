"""Reading nothing but files: what a stranger's folder has in their places is refused, not waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def require_regular_file(path: Path) -> None:
    """Raise OSError for what is no file, such as a pipe or a device: to read it could take forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def list_files(folder: Path) -> list[str]:
    """The names of what is directly in a folder, but for hidden files and other folders. Raises OSError."""
    return [entry.name for entry in os.scandir(folder) if entry.name[0] != "." and not _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself, which whoever reads the file tells of
        return False
