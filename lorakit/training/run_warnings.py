"""What may not be meant in a run and shows only with its data and its output folder; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from lorakit.config.train_config import TrainConfig
from lorakit.data.batch_sampler import steps_per_epoch
from lorakit.data.index import IndexedDataset
from lorakit.errors import Problem
from lorakit.utils.wording import shown_path


def run_warnings(config: TrainConfig, datasets: Sequence[IndexedDataset], resuming: bool) -> Iterator[Problem]:
    """A warm-up that is as long as the run, and a finished LoRA that the run will replace.

    A run that resumes replaces what is its own.
    """
    training = config.training
    if training.max_epochs is not None:  # else the config's own warnings cover it
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        own = steps_per_epoch(datasets, world_size, training.gradient_accumulation_steps)
        yield from config.warnings_of_length(training.max_epochs * own)
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
