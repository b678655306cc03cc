"""Where to save the result of hours when the output folder cannot be written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from lorakit.errors import NotSaved, OutputError


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
