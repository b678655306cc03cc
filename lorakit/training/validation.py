"""The validation loss: the training loss on held-out images, always with the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

import torch
from attrs import evolve, frozen

from lorakit.config.train_config import TrainConfig
from lorakit.data.batch_sampler import RankMicroBatch, plan_epoch
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

    def batches(self, timesteps: Sequence[float], max_batches: int | None) -> Iterator[Batch]:
        """Each batch at each timestep, in a fixed order in which buckets are mixed; `max_batches` or all of them.

        Posterior sample and noise of an image depend on the seed, the image and the timestep.
        """
        planned = plan_epoch(self.loaders[0].datasets, self.loaders[0].seed, BEFORE_TRAINING)
        for step in islice(planned, max_batches):
            (items,) = step.micro_batches
            loader = self.loaders[items[0].dataset]
            for timestep in timesteps:
                # Keyed by the timestep; by millionths of it where time is continuous.
                key = timestep if isinstance(timestep, int) else round(timestep * 1e6)
                refs = tuple(item._replace(repeat=key) for item in items)
                batch = loader.load(RankMicroBatch(BEFORE_TRAINING, refs, len(refs)))
                yield evolve(batch, timesteps=torch.full_like(batch.timesteps, timestep))


def validation_loss(run: Run, images: ValidationSet, timesteps: Sequence[float], max_batches: int | None) -> float:
    """The mean of the loss of training over images and timesteps, with the model as a saved file would make it.

    Synchronizes with the device once, at the end.
    """
    total, count = torch.zeros((), device=run.processes.device), 0
    with run.evaluating() as model, closing(run.prefetched(images.batches(timesteps, max_batches))) as batches:
        for batch in batches:
            moved = batch.to(run.processes.device)
            size = len(moved.timesteps)
            run.network.begin_batch(moved.sample_seeds)
            total += size * denoising_loss(model, moved, run.encode(moved), run.criterion)
            count += size
    return total.item() / count
