"""The validation loss: the training loss on held-out images, always with the same noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import product
from math import fsum
from typing import TYPE_CHECKING

import torch
from attrs import evolve, frozen

from lorakit.config.train_config import TrainConfig
from lorakit.data.batch_sampler import RankMicroBatch, SampleRef, plan_epoch
from lorakit.data.index import IndexedDataset
from lorakit.data.loader import Batch, BatchLoader
from lorakit.training.step.loss import denoising_loss

if TYPE_CHECKING:
    from lorakit.training.run import Run

BEFORE_TRAINING = 0
"""The epoch that draws for validation are keyed by; those of training count from 1."""


@frozen
class ValidationSet:
    """The images that are held out from training, as batches that are the same whenever they are loaded."""

    loaders: Sequence[BatchLoader]
    """One for each dataset, with its seed; each knows all datasets."""

    @classmethod
    def of(cls, loader: BatchLoader, datasets: Sequence[IndexedDataset], config: TrainConfig) -> ValidationSet | None:
        """The held-out images in `datasets`, loaded as those of training are; None where there are none."""
        if not datasets:
            return None
        seeds = [dataset.config.seed_of_validation(config.training.seed) for dataset in datasets]
        return cls([evolve(loader, datasets=datasets, seed=seed) for seed in seeds])

    def plan(self, timesteps: Sequence[float], max_batches: int | None) -> list[tuple[tuple[SampleRef, ...], float]]:
        """The images of each batch at each timestep, in a fixed order in which buckets are mixed.

        There are `max_batches` batches, or all of them.
        """
        planned = plan_epoch(self.loaders[0].datasets, self.loaders[0].seed, BEFORE_TRAINING)
        batches = [items for step in planned for items in step.micro_batches]
        return list(product(batches[:max_batches], timesteps))

    def load(self, planned: Iterable[tuple[tuple[SampleRef, ...], float]]) -> Iterator[Batch]:
        """The batches; posterior sample and noise of an image depend on the seed, the image and the timestep."""
        for items, timestep in planned:
            # Keyed by the timestep; by millionths of it where time is continuous.
            key = timestep if isinstance(timestep, int) else round(timestep * 1e6)
            refs = tuple(item._replace(repeat=key) for item in items)
            batch = self.loaders[items[0].dataset].load(RankMicroBatch(BEFORE_TRAINING, refs, len(refs)))
            yield evolve(batch, timesteps=torch.full_like(batch.timesteps, timestep))


def validation_loss(
    run: Run, images: ValidationSet, timesteps: Sequence[float], max_batches: int | None, *, shared: bool = False
) -> float:
    """The mean of the loss of training over images and timesteps, with the model as a saved file would make it.

    With `shared` each process computes a share of the batches, with the same result on each as on one process.
    Synchronizes with the device once, at the end.
    """
    planned = images.plan(timesteps, max_batches)
    processes = run.processes
    if shared:
        own = planned[processes.rank :: processes.world_size]
        losses = [loss for part in processes.together(lambda: _losses(run, images.load(own))) for loss in part]
    else:
        losses = _losses(run, images.load(planned))
    # Exact, and so independent of the order.
    return fsum(losses) / sum(len(items) for items, _ in planned)


def _losses(run: Run, loaded: Iterator[Batch]) -> list[float]:
    """The loss of each batch, summed over its images."""
    losses = []
    with run.evaluating() as model, closing(run.prefetched(loaded)) as batches:
        for batch in batches:
            moved = batch.to(run.processes.device)
            run.network.begin_batch(moved.sample_seeds)
            losses.append(len(moved.timesteps) * denoising_loss(model, moved, run.encode(moved), run.criterion))
        return torch.stack(losses).tolist() if losses else []
