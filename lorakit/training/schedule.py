"""The order of work of a run: which step trains on which images, from the first step to the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from attrs import frozen

from lorakit.config.train_config import TrainingSection
from lorakit.data.batch_sampler import PlannedStep, RankMicroBatch, RunLength, micro_batches_per_epoch, plan_epoch
from lorakit.data.index import IndexedDataset
from lorakit.data.loader import Batch, BatchLoader
from lorakit.training.runtime.distributed import Distributed


@frozen
class ScheduledStep:
    """One optimizer step and its place in the run."""

    planned: PlannedStep
    shares: tuple[RankMicroBatch, ...]
    """This process's part of its micro-batches."""
    ends_epoch: bool


class Schedule:
    """All steps of a run; the same for every process, and the same after a resume."""

    def __init__(self, datasets: Sequence[IndexedDataset], training: TrainingSection, processes: Distributed) -> None:
        accumulation, world_size = training.gradient_accumulation_steps, processes.world_size
        self._processes = processes
        # Two are enough: the steps being trained and the batches being prepared are at most one epoch apart.
        self._plan = lru_cache(maxsize=2)(
            lambda epoch: plan_epoch(datasets, training.seed, epoch, world_size, accumulation)
        )
        self.micro_batches_per_epoch = micro_batches_per_epoch(datasets, world_size)
        length = RunLength.of(datasets, training, world_size)
        self.steps_per_epoch = length.steps_per_epoch
        self.total_steps = length.total_steps
        self.total_epochs = length.total_epochs

    def steps_from(self, done: int) -> Iterator[ScheduledStep]:
        """The steps after the first `done` ones."""
        for number in range(done, self.total_steps):
            epoch, index = number // self.steps_per_epoch + 1, number % self.steps_per_epoch
            planned = self._plan(epoch)[index]
            shares = planned.shares(self._processes.rank, self._processes.world_size)
            yield ScheduledStep(planned, shares, ends_epoch=index == self.steps_per_epoch - 1)

    def batches_from(self, done: int, loader: BatchLoader) -> Iterator[Batch]:
        """The micro-batches of this process in those steps, in order."""
        return loader.batches(share for step in self.steps_from(done) for share in step.shares)
