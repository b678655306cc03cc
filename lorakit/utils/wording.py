"""Numbers, times and lists in the words that users read; imports nothing heavy."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

WIDTH = 80
"""Columns that text for terminals fits into."""


def counted(number: int, word: str, plural: str = "") -> str:
    """A number with its noun: `1 image`, `20 images`, `2 batches`."""
    return f"{number} {word if number == 1 else plural or word + 's'}"


def counted_in(count: int, noun: str, place: str, verb: str = "are") -> str:
    """`1 image in photos is` or `3 images in photos are`; `have` and other verbs likewise."""
    singular = {"are": "is", "have": "has"}.get(verb, f"{verb}s")
    return f"{counted(count, noun)} in {place} {singular if count == 1 else verb}"


def some(texts: Sequence[str], most: int = 3, more: str = ", …", separator: str = ", ") -> str:
    """The first of several texts; `more`, which may contain `{}` for their number, if there are others."""
    return separator.join(texts[:most]) + (more.format(len(texts) - most) if len(texts) > most else "")


def some_names(files: Sequence[Path], most: int = 3) -> str:
    """The names of the first of several files, without their folders, and an ellipsis if there are more."""
    return some([file.name for file in files], most)


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def duration(seconds: float) -> str:
    """A time in the units that suit it: `21 s`, `13 min`, `2 h 5 min`, `1 d 3 h`."""
    seconds = max(round(seconds), 0)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = round(minutes / 60)
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def file_size(size: int) -> str:
    """Bytes as file managers show them, in powers of 1000: `812 bytes`, `38 MB`, `1.2 GB`."""
    number, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 999.5:
            break
        number, unit = number / 1000, larger
    return f"{number:.1f} {unit}" if number < 9.95 and unit != "bytes" else f"{number:.0f} {unit}"


def shown_path(path: Path) -> str:
    """A path as it is shortest to read from the working folder."""
    try:
        return min(str(path), os.path.relpath(path), key=len)
    except (ValueError, OSError):  # on another drive, or the working folder is gone
        return str(path)


def printable(text: str, keep: str = "") -> str:
    """A text with spaces for what could steer a terminal, as a stranger's file may hold it; `keep` is left in it."""
    return "".join(own if own.isprintable() or own in keep else " " for own in text)


def with_short_paths(text: str) -> str:
    """A message in which paths below the working folder are relative to it, as they are shortest to read."""
    try:
        folder = str(Path.cwd())
    except OSError:  # it is gone
        return text
    inside = folder if folder.endswith(os.sep) else folder + os.sep
    if len(inside) == len(Path(folder).anchor):  # the root, of which all paths are
        return text
    return re.sub(rf"(?<![\w.~/\\-]){re.escape(inside)}(?=[^\s/\\])", "", text)


def labelled(rows: Sequence[tuple[str, str]], label_width: int) -> list[str]:
    """Indented rows of a label and a text, in lines that fit into `WIDTH`; words longer than a line stay whole."""
    lines = []
    for label, text in rows:
        first = f"  {label:<{label_width}} "
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first),
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines
