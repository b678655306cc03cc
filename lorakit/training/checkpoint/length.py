"""What depends on how long a run is, and so changes when a state is taken up by a longer or shorter run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch.optim.lr_scheduler import LRScheduler

from lorakit.config.train_config import TrainConfig

log = logging.getLogger(__name__)


def follow(lr_scheduler: LRScheduler, first_rates: Sequence[float], steps: int) -> None:
    """Bring a schedule that has not begun to where it is after so many steps.

    `first_rates` are those that its optimizer's groups have before the first step.
    """
    for group, rate in zip(lr_scheduler.optimizer.param_groups, first_rates, strict=True):
        group["lr"] = rate
    with warnings.catch_warnings():
        # It expects a step of the optimizer before each of its own.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            lr_scheduler.step()


def warn_of_length(config: TrainConfig, done: int, before: int, now: int) -> None:
    """Say if the `done` first steps of a run of `before` steps are not those of a run of `now` steps."""
    changed = " and ".join(_changed(config, done, before, now)) if before != now else ""
    if changed:
        log.warning(
            "the state is of a run of %d steps, on which %s depend; a run of %d steps had others in the first %d, "
            "so the result will be between the two",
            before, changed, now, done,
        )  # fmt: skip


def _changed(config: TrainConfig, done: int, before: int, now: int) -> Iterator[str]:
    if _rates(config, done, before) != _rates(config, done, now):
        yield "learning rates"
    subsets = [subset for dataset in config.data.datasets for subset in dataset.subsets]
    if any(0 < subset.token_warmup_step < 1 for subset in subsets):
        yield "numbers of tags"


def _rates(config: TrainConfig, done: int, total_steps: int) -> list[float]:
    """The learning rates of the first steps, for a part that is trained."""
    trained = config.model.parts_named(config.trained_parts)
    lr = max(rate for part in trained for rate in config.optimizer.lrs_for(part))
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=lr)
    schedule = config.lr_scheduler.build(optimizer, total_steps)
    rates = []
    for _ in range(done):
        rates.append(optimizer.param_groups[0]["lr"])
        follow(schedule, rates[-1:], 1)
    return rates
