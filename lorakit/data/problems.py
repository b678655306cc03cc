"""Many problems in few words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import DataError

LISTED = 20
"""How many problems a message lists before it only counts them."""


def data_error(problems: Sequence[str]) -> DataError:
    """One error for all problems, each on a line of its own; the first 20 are listed."""
    if len(problems) == 1:
        return DataError(problems[0])
    lines = [f"{len(problems)} problems with the data:", *(f"  {problem}" for problem in problems[:LISTED])]
    if len(problems) > LISTED:
        lines.append(f"  … and {len(problems) - LISTED} more")
    return DataError("\n".join(lines))


def some(texts: Sequence[str], most: int = 3) -> str:
    """The first of several texts, and an ellipsis if there are more."""
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "")


def some_names(files: Sequence[Path], most: int = 3) -> str:
    """The names of the first of several files, without their folders, and an ellipsis if there are more."""
    return some([file.name for file in files], most)


def counted(count: int, noun: str, place: Path, verb: str = "are") -> str:
    """`1 image in photos is` or `3 images in photos are`; `have` and other verbs likewise."""
    singular = {"are": "is", "have": "has"}.get(verb, f"{verb}s")
    return f"1 {noun} in {place} {singular}" if count == 1 else f"{count} {noun}s in {place} {verb}"
