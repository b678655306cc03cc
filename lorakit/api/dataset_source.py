"""What a dataset source lists: images with their captions and masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from attrs import Factory, field, frozen


@frozen
class SourceImage:
    """An image that a dataset source lists."""

    image: Path
    """The image file."""
    caption: Path | str | None = None
    """Its caption, or the text file that contains it; None if it has none. With `enable_wildcard`, each line is a
    caption of its own."""
    mask: Path | None = None
    """An image of the same size whose white or red areas count in the loss; None if all of the image counts."""
    name: str = field(default=Factory(lambda self: self.image.name, takes_self=True))
    """Identifies the image in its subset, and must be the same on every machine: random draws depend on it."""


class DatasetSource(Protocol):
    """The images of one subset."""

    def list_images(self, problems: list[str]) -> Iterable[SourceImage]:
        """The images, in any order; opens none of them.

        A message for each entry that cannot be used is appended to `problems`, so that all are reported at once.
        Raises DataError where nothing can be listed.
        """
