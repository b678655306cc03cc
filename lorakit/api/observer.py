"""What an observer sees: the run, the numbers of each step, and the events.

Observers run on the main process only, unless their config says `everywhere`. Numbers are plain floats, read from the
device some steps late where reading at once would make the device wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from attrs import field, frozen

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget, DiffusionModel

T = TypeVar("T")


class RunInfo(Protocol):
    """The run as its observers see it: what they may know of it, and do with it."""

    @property
    def config(self) -> TrainConfig:
        """The resolved config."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def first_step(self) -> int:
        """Steps done before, more than zero in a resumed run."""

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, the last one possibly cut short."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""

    @property
    def images(self) -> int:
        """Images in the dataset, repeats not counted."""

    @property
    def encodes_captions(self) -> bool:
        """Whether captions are encoded in each step, for which the text encoder stays in memory; else it is freed."""

    @property
    def holds_out_images(self) -> bool:
        """Whether images are held out from training, for validation."""

    @property
    def targets(self) -> Sequence[AdaptationTarget]:
        """The layers that have adapters, with their names in LoRA files of all layouts."""

    @property
    def rank(self) -> int:
        """The number of this process among those that train together; 0 is the main process."""

    @property
    def world_size(self) -> int:
        """How many processes train together."""

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each process, by rank; for observers that run `everywhere`, all of which must call it.

        What raises on one process raises on all of them. Results are pickled.
        """

    def save_adapter(self, stem: str, folder: Path | None = None, metadata: Mapping[str, str] = ...) -> Path:
        """Save the adapters as they are now under a file name without extension, `save_adapter("lora-half")`.

        The default folder is the output folder; `metadata` is added to what the file says of itself, if its format can.
        Returns the path. Raises OutputError where the file cannot be written.
        """

    def save_state(self, folder: Path | None = None) -> Path:
        """Save all that is needed to resume from here; returns the state's own folder.

        The default is the run's folder of states. Raises OutputError where the state cannot be written.
        """

    def evaluating(self) -> AbstractContextManager[DiffusionModel]:
        """The model as a saved file would make it, for a `with` block.

        It has no gradients, no dropout and the optimizer's evaluation weights. Training continues afterwards as if the
        block had not been, as long as randomness in it is keyed.
        """

    def validation_loss(self, timesteps: Sequence[float], max_batches: int | None = None) -> float:
        """The mean loss on held-out images at these timesteps, with noise that is always the same.

        It is over `max_batches` batches, or all. Raises ValueError where no images are held out.
        """

    def shared_validation_loss(self, timesteps: Sequence[float], max_batches: int | None = None) -> float:
        """The same, of which each process computes a part; for observers that run `everywhere`.

        All processes must call it.
        """

    def tell(self, event: str, *values: object) -> None:
        """Notify all observers of an event, by the name of its method: `tell("previews_drawn", step, paths)`."""

    def training_seconds(self) -> float:
        """Seconds that steps have taken since the run started, without saves, previews and validation."""


@frozen(kw_only=True)
class StepMetrics:
    """Numbers of one finished step."""

    step: int
    """Optimizer steps done, this one included."""
    epoch: int
    """Epoch the step belongs to, from 1."""
    loss: float
    """Mean loss over the step's images, of all processes."""
    gradient_norm: float
    """L2 norm of the gradients before clipping."""
    learning_rates: Mapping[str, float] = field(factory=dict)
    """Learning rate of each parameter group in this step."""
    values: Mapping[str, float] = field(factory=dict)
    """What else the network measured after this step, by the names of curves: `norm/avg_key_norm`."""


@frozen
class Every:
    """When an observer acts: after every N epochs or N steps; never, where a number is None."""

    epochs: int | None = None
    steps: int | None = None

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether to act after an epoch; epochs count from 1."""
        return self.epochs is not None and epoch % self.epochs == 0

    def is_due_after_step(self, step: int) -> bool:
        """Whether to act after a step; steps count from 1."""
        return self.steps is not None and step % self.steps == 0


class Observer:
    """A callback on the events of a run; override those that matter."""

    def run_started(self, run: RunInfo) -> None:
        """The first step is about to begin."""

    def busy(self, what: str) -> None:
        """Something other than a step begins and may take a while: `drawing 5 previews of step 0`."""

    def step_finished(self, step: int) -> None:
        """A step is done and the adapters are updated; `step` counts from 1."""

    def metrics_read(self, metrics: StepMetrics) -> None:
        """The numbers of a step were read; in order, possibly some steps late, of all but skipped steps."""

    def epoch_finished(self, epoch: int) -> None:
        """An epoch is done; `epoch` counts from 1."""

    def adapter_saved(self, path: Path) -> None:
        """A file with adapters has been written."""

    def state_saved(self, folder: Path) -> None:
        """A state has been written, from which the run can be resumed."""

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:
        """Previews of the adapters after `step` steps have been written as PNG files."""

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """The validation loss has been measured after `step` steps.

        `losses` has the `average` over images and, once a step is done, its `divergence`: how far it is above the
        training loss.
        """

    def run_finished(self) -> None:
        """All steps are done."""

    def closed(self) -> None:
        """The run is over, however it ended; always called last."""
