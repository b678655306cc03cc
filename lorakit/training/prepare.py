"""What is done before torch is imported: everything that can be wrong with files shows here.

Writes nothing and reads no weights, so a mistake costs a moment and leaves no trace.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from attrs import evolve, frozen

from lorakit.config.train_config import TrainConfig
from lorakit.data.batch_sampler import RunLength
from lorakit.data.cache.store import Cache
from lorakit.data.index import IndexedDataset, has_augmentation, has_dynamic_captions, index_datasets
from lorakit.data.review.captions import longest_by_image
from lorakit.data.review.images import review
from lorakit.errors import OutputError, Problem
from lorakit.training.run_warnings import run_warnings
from lorakit.training.runtime.hardware import hardware_warnings
from lorakit.utils.atomic_io import unwritable_reason


@frozen
class PreparedRun:
    """A config whose files are there and can be used."""

    config: TrainConfig
    datasets: Sequence[IndexedDataset]
    """The images and captions."""
    cache: Cache
    """The cache of what they are encoded to; what it knows of the images is not written yet."""
    warnings: tuple[Problem, ...] = ()
    """What may not be meant, on this machine and with these files; the config's own warnings are not among them."""

    @property
    def images(self) -> int:
        """How many images there are to train on, repeats not counted."""
        return sum(len(dataset.examples) for dataset in self.datasets)

    @property
    def validation(self) -> tuple[IndexedDataset, ...]:
        """The datasets, each with the images that are held out of it and no others; nothing where none is."""
        if not any(dataset.held_out for dataset in self.datasets):
            return ()
        return tuple(IndexedDataset(dataset.config, dataset.held_out) for dataset in self.datasets)

    @property
    def processes(self) -> int:
        """How many processes of a launcher train together, as far as it says so before torch is imported."""
        count = os.environ.get("WORLD_SIZE", "")
        return max(int(count), 1) if count.isdecimal() else 1

    @property
    def length(self) -> RunLength:
        """How many steps and epochs the run takes."""
        return RunLength.of(self.datasets, self.config.training, self.processes)

    @property
    def encodes_images(self) -> bool:
        """Whether images are encoded in each step, as some vary from epoch to epoch."""
        return has_augmentation((*self.datasets, *self.validation))

    @property
    def encodes_captions(self) -> bool:
        """Whether captions are encoded in each step, as the text encoder is trained or captions vary."""
        return self.config.trains_text_encoders or has_dynamic_captions((*self.datasets, *self.validation))

    @property
    def parts_in_memory(self) -> tuple[str, ...]:
        """The parts of the base model that can be adapted and are in memory while the network trains."""
        return tuple(part.name for part in self.config.model.parts if not part.encoders or self.encodes_captions)


def prepare(config: TrainConfig, *, resuming: bool = False) -> PreparedRun:
    """Look at the machine and the output folder, and index the data; `resuming` a state, or for a new run.

    Raises OutputError or DataError; the latter lists all folders and files that cannot be used.
    """
    reason = unwritable_reason(config.output.dir)
    if reason:
        raise OutputError(f"output.dir: {reason}")
    cache = Cache(config.cache_dir)
    datasets = index_datasets(config.data.datasets, config.data.workers, cache.memo, config.training.seed)
    of_captions = config.model.warnings_of_captions(longest_by_image(datasets), config.data.weighted_captions)
    warnings = (
        *hardware_warnings(config.training),
        *review(datasets, cache.memo),
        *(evolve(warning, key=f"model.{warning.key}") for warning in of_captions),
        *run_warnings(config, datasets, resuming),
    )
    return PreparedRun(config, datasets, cache, warnings=warnings)
