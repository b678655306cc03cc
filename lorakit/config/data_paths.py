"""Paths of data that lead nowhere: what is there instead, and which names are near."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

_METADATA = (".json", ".jsonl", ".csv")


def why_no_folder(path: Path) -> tuple[str, str]:
    """Why a path is not a folder, as the end of a sentence that starts with it, and the cure if one is known."""
    if not os.path.isfile(path):  # noqa: PTH113 - `Path.is_file` raises for overlong names
        return "is not a folder", near_names(path)
    if path.suffix.lower() in _METADATA:
        return "is a file, not a folder", f'to read captions from it: metadata_file = "{path.as_posix()}"'
    if path.suffix.lower() == ".toml":
        return "is a file, not a folder", f'to read a dataset file: [data] with config = "{path.as_posix()}" alone'
    return "is a file, not a folder", f'give a folder, "{path.parent.as_posix()}" perhaps'


def near_names(path: Path) -> str:
    """A hint with the names beside a path that are nearly the same; empty if there are none."""
    try:
        names = os.listdir(path.parent)  # noqa: PTH208 - names are what is compared
    except (OSError, ValueError):
        return ""
    by_lower = {name.lower(): name for name in sorted(names)}
    near = difflib.get_close_matches(path.name.lower(), by_lower, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""
