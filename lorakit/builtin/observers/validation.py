"""Validation: the loss on images that are held out from training, every N epochs or steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.observer import Every, Observer, RunInfo, StepMetrics
from lorakit.checkpoints.safetensors_header import read_safetensors_header
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ModelError, OutputError, Problem

log = logging.getLogger(__name__)

LOSS_KEY = "lorakit_validation_loss"
"""The key of metadata with the validation loss of what a file holds."""


@frozen(kw_only=True)
class ValidationConfig(ObserverConfig):
    """The validation loss, on images held out by `validation_split`; always active if there are any."""

    name = "validation"
    everywhere = True

    every_n_epochs: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Validate every N epochs; 1 if neither this nor `every_n_steps` is set."""
    every_n_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Validate every N optimizer steps."""
    with_saves: bool = False
    """Validate whenever the LoRA is saved, as [output] says, instead of every epoch."""
    keep_best: bool = False
    """Whenever the loss is the lowest so far, save the LoRA as NAME-best."""
    max_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Number of micro-batches to validate on, the same each time; all if absent."""
    timesteps: tuple[int | float, ...] = field(default=(), validator=v.deep_iterable(v.ge(0)))
    """Timesteps at which to measure the loss of each image, as the model counts them; if empty, four that divide the
    training range into fifths."""

    def problems(self) -> Iterator[Problem]:
        """Two ways to say when."""
        if self.with_saves and (self.every_n_epochs or self.every_n_steps):
            yield Problem("with_saves", "cannot be used with every_n_epochs or every_n_steps", "use one of them")

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Timesteps that the model does not have."""
        process = config.model.noise_process
        beyond = [timestep for timestep in self.timesteps if timestep >= process.end]
        if beyond:
            yield Problem("timesteps", f"must be below {process.end:g}, not {beyond[0]}")
        elif process.num_timesteps and any(isinstance(timestep, float) for timestep in self.timesteps):
            yield Problem("timesteps", "must be whole numbers for this model")

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """A run that holds no images out."""
        if not any(dataset.validation_split for dataset in config.data.datasets):
            yield Problem("name", '"validation" has no effect without data.validation_split')
        output = config.output
        if self.with_saves and not (output.epochs_between_saves(1) or output.save_every_n_steps):
            yield Problem("with_saves", "validates at the end only, because nothing is saved before")

    def build(self, run_info: RunInfo) -> Observer:
        """What validates one run; nothing where no images are held out."""
        return Validation(self, run_info) if run_info.holds_out_images else Observer()


class Validation(Observer):
    """Validates when it is time, and at the end; reports the loss and its distance from the training loss."""

    def __init__(self, config: ValidationConfig, run: RunInfo) -> None:
        self._config = config
        self._run = run
        self._every = _when(config, run)
        self._timesteps = config.timesteps or fifths(run.config)
        self._recent: deque[float] = deque(maxlen=run.steps_per_epoch)
        self._step = self._validated = run.first_step
        self._lowest = _lowest_before(run) if config.keep_best else None

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Remember the training losses of the last steps, as many as an epoch has."""
        self._recent.append(metrics.loss)

    def step_finished(self, step: int) -> None:
        """Validate when the step is a multiple of `every_n_steps`."""
        self._step = step
        if self._every.is_due_after_step(step):
            self._validate()

    def epoch_finished(self, epoch: int) -> None:
        """Validate when the epoch is a multiple of `every_n_epochs`."""
        if self._every.is_due_after_epoch(epoch):
            self._validate()

    def run_finished(self) -> None:
        """Validate what the run has come to."""
        self._validate()

    def _validate(self) -> None:
        """Measure and tell, unless that was done after this very step."""
        if self._validated == self._step:
            return
        self._validated = self._step
        self._run.tell("busy", "validating")
        loss = self._run.shared_validation_loss(self._timesteps, self._config.max_steps)
        losses = {"average": loss}
        if self._recent:
            losses["divergence"] = loss - sum(self._recent) / len(self._recent)
        self._run.tell("validated", self._step, losses)
        if self._config.keep_best and (self._lowest is None or loss < self._lowest):
            self._lowest = loss
            self._save(loss)

    def _save(self, loss: float) -> None:
        """Save what has the lowest loss so far, on the main process."""
        if self._run.rank:
            return
        try:
            self._run.save_adapter(best_name(self._run.config), metadata={LOSS_KEY: repr(loss)})
        except OutputError as error:
            log.warning("%s Training continues.", error)


def best_name(config: TrainConfig) -> str:
    """The file name of a run's best save, without extension."""
    return f"{config.output.name}-best"


def _when(config: ValidationConfig, run: RunInfo) -> Every:
    """When to validate, apart from the end."""
    if config.with_saves:
        output = run.config.output
        return Every(output.epochs_between_saves(run.total_epochs), output.save_every_n_steps)
    return Every(config.every_n_epochs or (None if config.every_n_steps else 1), config.every_n_steps)


def _lowest_before(run: RunInfo) -> float | None:
    """The loss of the best save of a run that is resumed; None where there is none, or its file does not tell it."""
    path = run.config.output.dir / f"{best_name(run.config)}.safetensors"
    if not run.first_step or not path.is_file():
        return None
    try:
        return float(read_safetensors_header(path).metadata[LOSS_KEY])
    except (ModelError, KeyError, ValueError):
        return None


def fifths(config: TrainConfig) -> tuple[float, ...]:
    """The four timesteps that divide the range of training into fifths: 200, 400, 600 and 800 of 1000."""
    process = config.model.noise_process
    low, high = config.timestep_sampler.bounds(process)
    span = high - low
    steps = (low + (span * part // 5 if process.num_timesteps else span * part / 5) for part in range(1, 5))
    return tuple(dict.fromkeys(steps))


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Validation."""
    return [ValidationConfig]
