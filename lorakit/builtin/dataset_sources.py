"""The dataset sources `folder` and `metadata_file`; a subset without `source` uses one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.dataset_source import DatasetSourceConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.errors import Problem

if TYPE_CHECKING:
    from lorakit.api.dataset_source import DatasetSource
    from lorakit.config.datasets import SubsetConfig


@frozen(kw_only=True)
class FolderConfig(DatasetSourceConfig):
    """The images in `image_dir`, each with a caption file of the same name."""

    name = "folder"
    needs_image_dir = True

    def build(self, subset: SubsetConfig) -> DatasetSource:
        """Lists the files of the folder, but not of folders in it."""
        from lorakit.data.sources.folders import FolderSource

        return FolderSource(subset)


@frozen(kw_only=True)
class MetadataFileConfig(DatasetSourceConfig):
    """The images and captions that `metadata_file` lists: JSON, JSON Lines or CSV."""

    name = "metadata_file"
    needs_image_dir = True

    def problems_in(self, subset: SubsetConfig) -> Iterator[Problem]:
        """That the subset names no file."""
        if subset.metadata_file is None:
            yield Problem("metadata_file", "is missing", "the file that lists the images")

    def build(self, subset: SubsetConfig) -> DatasetSource:
        """Lists the entries of the file."""
        from lorakit.data.sources.metadata_files import MetadataFileSource

        return MetadataFileSource(subset)


@hookimpl
def register_dataset_sources() -> list[type[DatasetSourceConfig]]:
    """Folders, and the metadata files of sd-scripts and the Hub."""
    return [FolderConfig, MetadataFileConfig]
