"""Which images each step of an epoch trains on, on any number of processes; imports no torch.

A global micro-batch is what all processes compute at once; each takes its share of it. The plan
depends on the batch size of all processes together alone, so N processes with batch size B take the
same steps as one with batch size N·B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

from attrs import frozen

from lorakit.config.train_config import DEFAULT_MAX_STEPS, TrainingSection
from lorakit.data.images.buckets import Size
from lorakit.data.index import IndexedDataset
from lorakit.utils.rng import keyed_generator


class SampleRef(NamedTuple):
    """One appearance of an image in an epoch."""

    dataset: int
    """Number of the dataset."""
    example: int
    """Number of the example in it."""
    repeat: int
    """Which of the image's appearances in the epoch it is, from 0."""


@frozen
class RankMicroBatch:
    """What one process computes of a global micro-batch: at least one image."""

    epoch: int
    """Number of the epoch."""
    items: tuple[SampleRef, ...]
    """This process's images."""
    micro_batch_size: int
    """Images in the global micro-batch."""
    step: int = 0
    """Optimizer steps of the run before this one."""

    @property
    def fraction(self) -> float:
        """The process's part of the global micro-batch; the parts of all processes sum to one."""
        return len(self.items) / self.micro_batch_size


@frozen
class StepPlan:
    """The images of one optimizer step, those of all processes."""

    epoch: int
    """Number of the epoch."""
    micro_batches: tuple[tuple[SampleRef, ...], ...]
    """The global micro-batches whose gradients the step accumulates; each of one dataset and bucket."""
    step: int
    """Optimizer steps of the run before this one."""
    ends_epoch: bool = False
    """Whether it is the last of its epoch."""

    def shares(self, rank: int, world_size: int) -> tuple[RankMicroBatch, ...]:
        """What one of the processes computes; nothing of micro-batches with fewer images than processes before it."""
        shares = (
            (len(items), items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size])
            for items in self.micro_batches
        )
        return tuple(RankMicroBatch(self.epoch, own, size, self.step) for size, own in shares if own)


@frozen
class Bucket:
    """The images of one size in a dataset."""

    size: Size
    """Width and height in pixels."""
    appearances: int
    """How often they appear in an epoch, all of them together."""
    batch_size: int
    """Images in a global micro-batch."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches in an epoch, of which the last may be short."""
        return ceil(self.appearances / self.batch_size)


@frozen
class RunLength:
    """How long a run is, in optimizer steps."""

    steps_per_epoch: int
    """Steps of a whole epoch."""
    total_steps: int
    """Steps of the whole run."""

    @classmethod
    def of(cls, datasets: Sequence[IndexedDataset], training: TrainingSection, world_size: int = 1) -> RunLength:
        """The length of a run on these datasets, on a number of processes."""
        per_epoch = steps_per_epoch(datasets, world_size, training.gradient_accumulation_steps)
        if training.max_epochs:
            return cls(per_epoch, training.max_epochs * per_epoch)
        return cls(per_epoch, training.max_steps or DEFAULT_MAX_STEPS)

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, the last one possibly cut short."""
        return -(-self.total_steps // self.steps_per_epoch)

    @property
    def last_epoch_steps(self) -> int:
        """Steps of the last epoch: fewer than of the others where the run ends within it."""
        return self.total_steps - (self.total_epochs - 1) * self.steps_per_epoch


def plan_epoch(
    datasets: Sequence[IndexedDataset], seed: int, epoch: int, world_size: int = 1, accumulation: int = 1
) -> list[StepPlan]:
    """The steps of an epoch, of which the first is 1: every image appears as often as its `repeats` say.

    Images are shuffled within their bucket and cut into micro-batches, of which the last may be short;
    the micro-batches of all datasets are shuffled together and taken `accumulation` at a time.
    """
    generator = keyed_generator(seed, "order", epoch)
    micro_batches = []
    for number, dataset in enumerate(datasets):
        size = dataset.config.batch_size * world_size
        for _, examples in _buckets(dataset):
            items = [
                SampleRef(number, example, repeat)
                for example in examples
                for repeat in range(dataset.examples[example].repeats)
            ]
            shuffled = [items[position] for position in generator.permutation(len(items))]
            micro_batches += [tuple(shuffled[start : start + size]) for start in range(0, len(items), size)]
    order = [micro_batches[position] for position in generator.permutation(len(micro_batches))]
    steps = [tuple(order[start : start + accumulation]) for start in range(0, len(order), accumulation)]
    before = (epoch - 1) * len(steps)
    last = len(steps) - 1
    return [StepPlan(epoch, images, before + number, number == last) for number, images in enumerate(steps)]


def steps_per_epoch(datasets: Sequence[IndexedDataset], world_size: int = 1, accumulation: int = 1) -> int:
    """How many steps `plan_epoch` plans, the same in every epoch."""
    return ceil(micro_batches_per_epoch(datasets, world_size) / accumulation)


def micro_batches_per_epoch(datasets: Sequence[IndexedDataset], world_size: int = 1) -> int:
    """How many micro-batches the steps of an epoch have together; each is of all processes."""
    return sum(bucket.micro_batches for bucket in buckets(datasets, world_size))


def buckets(datasets: Sequence[IndexedDataset], world_size: int = 1) -> list[Bucket]:
    """The buckets of all datasets, one dataset after the other, each sorted by size."""
    return [
        Bucket(size, sum(dataset.examples[own].repeats for own in examples), dataset.config.batch_size * world_size)
        for dataset in datasets
        for size, examples in _buckets(dataset)
    ]


def _buckets(dataset: IndexedDataset) -> Iterator[tuple[Size, list[int]]]:
    """The buckets of a dataset, sorted, each with the numbers of its examples."""
    found: dict[Size, list[int]] = {}
    for number, example in enumerate(dataset.examples):
        found.setdefault(example.placement.bucket, []).append(number)
    yield from sorted(found.items())
