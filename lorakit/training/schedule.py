"""The order of work of a run: which step trains on which images, from the first step to the last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice

from attrs import define, field
from torch import Tensor

from lorakit.config.train_config import TrainingSection
from lorakit.data.batch_sampler import RankMicroBatch, RunLength, StepPlan, buckets, micro_batches_per_epoch, plan_epoch
from lorakit.data.index import IndexedDataset
from lorakit.data.loader import Batch, BatchLoader
from lorakit.training.runtime.distributed import Distributed


@define(eq=False)
class Step:
    """One optimizer step of this process: its micro-batches, and the numbers that come of them.

    The numbers are scalars that stay on the device until those of several steps are read at once. The last five are set
    when the optimizer's step is done.
    """

    plan: StepPlan
    """What all processes train on in this step."""
    batches: Iterator[Batch]
    """This process's micro-batches, on its device, weighted so that their losses add up to the step's."""
    images: list[tuple[str, ...]] = field(factory=list)
    """Names of the images of each micro-batch so far."""
    losses: list[Tensor] = field(factory=list)
    """This process's part of the loss after each micro-batch so far."""
    loss: Tensor = field(init=False)
    """This process's part of the mean loss."""
    gradient_norm: Tensor = field(init=False)
    """L2 norm of all gradients before clipping."""
    group_norms: Tensor = field(init=False)
    """L2 norm of each parameter group's gradients, [G]."""
    values: Mapping[str, Tensor] = field(factory=dict)
    """What the network measured after the step, the same on all processes."""
    learning_rates: Mapping[str, float] = field(factory=dict)
    """Learning rate of each parameter group in this step."""

    @property
    def number(self) -> int:
        """Optimizer steps of the run, this one included."""
        return self.plan.step + 1

    def record(self, batch: Batch, loss: Tensor) -> None:
        """Note a micro-batch that was computed, and this process's loss so far."""
        self.images.append(batch.images)
        self.losses.append(loss.clone())


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
        shapes = {(bucket.size, bucket.batch_size) for bucket in buckets(datasets)}
        self.micro_batches_per_shape = self.total_steps * accumulation / len(shapes)
        """How many micro-batches the run has on average of each shape; short ones count as complete ones."""

    def plans_from(self, done: int) -> Iterator[StepPlan]:
        """The plans of the steps after the first `done` ones."""
        for number in range(done, self.total_steps):
            yield self._plan(number // self.steps_per_epoch + 1)[number % self.steps_per_epoch]

    def batches_from(self, done: int, loader: BatchLoader) -> Iterator[Batch]:
        """This process's micro-batches in those steps, in order."""
        return loader.batches(share for plan in self.plans_from(done) for share in self._shares(plan))

    def steps_from(self, done: int, batches: Iterator[Batch]) -> Iterator[Step]:
        """Those steps, whose micro-batches are taken from `batches`."""
        for plan in self.plans_from(done):
            yield Step(plan, self._step_batches(plan, batches))

    def _shares(self, plan: StepPlan) -> tuple[RankMicroBatch, ...]:
        return plan.shares(self._processes.rank, self._processes.world_size)

    def _step_batches(self, plan: StepPlan, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in islice(batches, len(self._shares(plan))):
            # The step's loss is a mean over all processes and micro-batches.
            yield batch.to(self._processes.device).scale_weights(batch.share / len(plan.micro_batches))
