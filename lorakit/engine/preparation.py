"""What is done before torch is imported: everything that can be wrong with files shows here.

Writes nothing and reads no weights, so a mistake costs a moment and leaves no trace.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from attrs import frozen

from lorakit.config.sections import TrainConfig
from lorakit.data.cache import Cache
from lorakit.data.examples import IndexedDataset, index_datasets
from lorakit.errors import OutputError


@frozen
class PreparedRun:
    """A config whose files are there and can be used."""

    config: TrainConfig
    datasets: Sequence[IndexedDataset]
    """The images and captions."""
    cache: Cache
    """The cache of what they are encoded to; what it knows of the images is not written yet."""

    @property
    def images(self) -> int:
        """How many images there are, repeats not counted."""
        return sum(len(dataset.examples) for dataset in self.datasets)


def prepare(config: TrainConfig) -> PreparedRun:
    """Look at the output folder and index the data.

    Raises OutputError or DataError; the latter lists all folders and files that cannot be used.
    """
    check_output(config)
    cache = Cache(config.cache_dir)
    return PreparedRun(config, index_datasets(config.data.datasets, config.data.workers, cache.memo), cache)


def check_output(config: TrainConfig) -> None:
    """Raise OutputError when the output folder cannot be made or written to; leaves no trace."""
    folder = config.output.dir
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise OutputError(f"output.dir: {existing} is a file, not a folder; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"output.dir: {existing} cannot be written to; choose another folder or change its rights")
