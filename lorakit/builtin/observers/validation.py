"""Validation: the loss on images that are held out from training, every so many epochs or steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.observer import Every, Observer, RunInfo, StepMetrics
from lorakit.config.train_config import TrainConfig
from lorakit.errors import Problem


@frozen(kw_only=True)
class ValidationConfig(ObserverConfig):
    """The validation loss, on images held out by `validation_split`; always active if there are any."""

    name = "validation"

    every_n_epochs: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Validate every N epochs; 1 if neither this nor `every_n_steps` is set."""
    every_n_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Validate every N optimizer steps."""
    max_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Number of micro-batches to validate on, the same each time; all if absent."""
    timesteps: tuple[int, ...] = field(default=(), validator=v.deep_iterable(v.ge(0)))
    """Timesteps at which to measure the loss of each image; if empty, four that divide the training range into
    fifths."""

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Timesteps that the model does not have."""
        beyond = [timestep for timestep in self.timesteps if timestep >= config.model.num_timesteps]
        if beyond:
            yield Problem("timesteps", f"must be below {config.model.num_timesteps}, not {beyond[0]}")

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """A run that contains no images out."""
        if not any(dataset.validation_split for dataset in config.data.datasets):
            yield Problem("name", '"validation" has no effect without data.validation_split')

    def build(self, run_info: RunInfo) -> Observer:
        """What validates one run; nothing where no images are held out."""
        if run_info.validation_loss is None:
            return Observer()
        return Validation(self, run_info, run_info.validation_loss)


class Validation(Observer):
    """Validates when it is time, and at the end; tells all observers of the loss and how far it is from training's."""

    def __init__(
        self, config: ValidationConfig, run: RunInfo, measure: Callable[[Sequence[int], int | None], float]
    ) -> None:
        self._config = config
        self._run = run
        self._measure = measure
        self._every = Every(config.every_n_epochs or (None if config.every_n_steps else 1), config.every_n_steps)
        self._timesteps = config.timesteps or fifths(run.config)
        self._recent: deque[float] = deque(maxlen=run.steps_per_epoch)
        self._step = self._validated = run.first_step

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
        loss = self._measure(self._timesteps, self._config.max_steps)
        losses = {"average": loss}
        if self._recent:
            losses["divergence"] = loss - sum(self._recent) / len(self._recent)
        self._run.tell("validated", self._step, losses)


def fifths(config: TrainConfig) -> tuple[int, ...]:
    """The four timesteps that part the range of training in fifths: 200, 400, 600 and 800 of 1000."""
    low, high = config.loss.min_timestep or 0, config.loss.max_timestep or config.model.num_timesteps
    return tuple(dict.fromkeys(low + (high - low) * part // 5 for part in range(1, 5)))


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Validation."""
    return [ValidationConfig]
