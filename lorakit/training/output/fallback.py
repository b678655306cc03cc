"""Where to save what took hours when the output folder takes nothing."""

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
    """Have something saved in its usual place, or else in a new folder here or among the temporary files.

    `save` is given the folder, None for the usual one. Raises NotSaved where no place takes it.
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
