"""Checks before torch is imported: everything that can be wrong with files shows here.

Writes nothing and reads no weights, so a mistake costs a moment and leaves no trace.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from attrs import evolve, frozen

from lorakit.config.train_config import TrainConfig
from lorakit.data.batch_sampler import RunLength, steps_per_epoch
from lorakit.data.cache.store import Cache
from lorakit.data.index import IndexedDataset, has_augmentation, has_dynamic_captions, index_datasets
from lorakit.data.review import longest_by_image, review
from lorakit.errors import OutputError, Problem
from lorakit.training.runtime.hardware import hardware_warnings
from lorakit.utils.atomic_io import unwritable_reason
from lorakit.utils.wording import shown_path


@frozen
class PreparedRun:
    """A config whose files are there and can be used."""

    config: TrainConfig
    datasets: Sequence[IndexedDataset]
    """The images and captions."""
    cache: Cache
    """The cache of what they are encoded to; what it knows of the images is not written yet."""
    warnings: tuple[Problem, ...] = ()
    """What may be unintended on this machine and with these files; the config's own warnings are not among them."""

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


@frozen(kw_only=True)
class CheckedRun:
    """A run as one process would train it: its length, and warnings."""

    config: TrainConfig
    """The config, with all its defaults."""
    images: int
    """Images to train on, repeats not counted."""
    held_out: int
    """Images that are held out for validation."""
    steps_per_epoch: int
    """Optimizer steps of a whole epoch."""
    steps: int
    """Optimizer steps of the whole run."""
    epochs: int
    """Epochs of the whole run, the last one possibly cut short."""
    warnings: tuple[Problem, ...]
    """What may be unintended, each with `key`, `message` and `hint`."""


def prepare(config: TrainConfig, *, resuming: bool = False, cache: Cache | None = None) -> PreparedRun:
    """Look at the machine and the output folder, and index the data; `resuming` a state, or for a new run.

    `cache` is that of the config's folder, where it is open already and knows the images.

    Raises OutputError or DataError; the latter lists all folders and files that cannot be used.
    """
    reason = unwritable_reason(config.output.dir)
    if reason:
        raise OutputError(f"output.dir: {reason}")
    cache = cache or Cache(config.cache_dir)
    datasets = index_datasets(config.data.datasets, config.data.workers, cache.memo, config.training.seed)
    of_captions = config.model.warnings_of_captions(longest_by_image(datasets), config.data.weighted_captions)
    warnings = (
        *hardware_warnings(config.training),
        *review(datasets, cache.memo),
        *(evolve(warning, key=f"model.{warning.key}") for warning in of_captions),
        *_run_warnings(config, datasets, resuming),
    )
    return PreparedRun(config, datasets, cache, warnings=warnings)


def check_run(config: TrainConfig) -> CheckedRun:
    """Look at the files of a run, and count. Raises the errors of `lorakit.errors`."""
    prepared = prepare(config)
    length = RunLength.of(prepared.datasets, config.training)
    return CheckedRun(
        config=config,
        images=prepared.images,
        held_out=sum(len(dataset.held_out) for dataset in prepared.datasets),
        steps_per_epoch=length.steps_per_epoch,
        steps=length.total_steps,
        epochs=length.total_epochs,
        warnings=(*config.warnings(), *prepared.warnings),
    )


def _run_warnings(config: TrainConfig, datasets: Sequence[IndexedDataset], resuming: bool) -> Iterator[Problem]:
    """A warm-up that is as long as the run, and a finished LoRA that the run will replace.

    A resumed run replaces its own file.
    """
    training = config.training
    if training.max_epochs is not None:  # else the config's own warnings cover it
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        per_epoch = steps_per_epoch(datasets, world_size, training.gradient_accumulation_steps)
        yield from config.warnings_of_length(training.max_epochs * per_epoch)
    # All savers that come with lorakit are called as their files end.
    finished = config.output.dir / f"{config.output.name}.{config.saver.name}"
    if not resuming and finished.is_file():
        when = _in_words(datetime.fromtimestamp(finished.stat().st_mtime), datetime.now())
        message = f"{shown_path(finished)} ({when}) will be replaced at the end"
        yield Problem("output.name", message, "--set output.name=NAME keeps it")


def _in_words(then: datetime, now: datetime) -> str:
    """A time as people say it: `today 9:05`, `yesterday 21:03`, `2026-11-22 21:03`."""
    days = {now.date(): "today", (now - timedelta(days=1)).date(): "yesterday"}
    return f"{days.get(then.date(), f'{then:%Y-%m-%d}')} {then.hour}:{then:%M}"
