"""Dataset sources: what lists images with their captions and masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from attrs import Factory, field, frozen

from lorakit.api.components import Component
from lorakit.errors import Problem

if TYPE_CHECKING:
    from lorakit.config.datasets import SubsetConfig


@frozen
class SourceImage:
    """An image that a dataset source lists."""

    image: Path
    """The image file."""
    caption: Path | str | None = None
    """Its caption, or the text file that contains it; None if it has none. With `enable_wildcard`, each line is a
    separate caption."""
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


@frozen(kw_only=True)
class DatasetSourceConfig(Component):
    """Where the images and captions of a subset come from; its fields are further keys of the subset's table."""

    kind = "dataset source"
    product = "a DatasetSource, with list_images"
    product_methods = ("list_images",)
    needs_image_dir: ClassVar[bool] = False
    """Whether a subset with this source must have `image_dir`; else it is the config file's folder if absent."""

    def problems_in(self, subset: SubsetConfig) -> Iterator[Problem]:  # noqa: ARG002
        """What is wrong with the fields in this subset; keys are those of the subset's table."""
        return iter(())

    def build(self, subset: SubsetConfig) -> DatasetSource:
        """The source of the images of a subset."""
        raise NotImplementedError(f"{type(self).__name__} has no method build")
