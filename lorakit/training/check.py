"""What can be said of a run that nothing is wrong with, without torch."""

from __future__ import annotations

from attrs import frozen

from lorakit.config.train_config import DEFAULT_MAX_STEPS, TrainConfig
from lorakit.data.batch_sampler import steps_per_epoch
from lorakit.errors import Problem
from lorakit.training.prepare import PreparedRun, prepare


@frozen(kw_only=True)
class CheckedRun:
    """A run as one process would train it: how long it is, and what may not be meant."""

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
    """What may not be meant, each with `key`, `message` and `hint`."""


def check_run(config: TrainConfig) -> CheckedRun:
    """Look at the files of a run, and count. Raises the errors of `lorakit.errors`."""
    prepared: PreparedRun = prepare(config)
    training = config.training
    per_epoch = steps_per_epoch(prepared.datasets, accumulation=training.gradient_accumulation_steps)
    steps = training.max_epochs * per_epoch if training.max_epochs else training.max_steps or DEFAULT_MAX_STEPS
    return CheckedRun(
        config=config,
        images=prepared.images,
        held_out=sum(len(dataset.held_out) for dataset in prepared.datasets),
        steps_per_epoch=per_epoch,
        steps=steps,
        epochs=-(-steps // per_epoch),
        warnings=(*config.warnings(), *prepared.warnings),
    )
