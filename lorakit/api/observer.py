"""What an observer sees: the run, the numbers of each step, and the events.

Observers run on the main process only. An event is one frozen value; numbers in it are plain floats,
read from the device some steps late where reading at once would make the device wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import DiffusionModel


@frozen(kw_only=True)
class RunInfo:
    """What an observer may know of the run it watches, and do with it."""

    config: TrainConfig
    """The resolved config."""
    total_steps: int
    """Optimizer steps of the whole run."""
    first_step: int
    """Steps done before, more than zero in a resumed run."""
    total_epochs: int
    """Epochs of the whole run, the last one possibly cut short."""
    steps_per_epoch: int
    """Optimizer steps of a whole epoch."""
    images: int
    """Images in the dataset, repeats not counted."""
    encodes_captions: bool
    """Whether captions are encoded in each step, for which the text encoder stays in memory; else it is freed."""
    save_adapter: Callable[..., Path]
    """Writes the adapters as they are now under a file name without extension, `save_adapter("lora-half")`, in the
    output folder, or in one that comes second; gives the path. Raises OutputError where they cannot be written."""
    save_state: Callable[..., Path]
    """Writes all that is needed to go on from here, `save_state()`, in the folder of states, or in another that is
    given; gives the state's own folder. Raises OutputError where it cannot be written."""
    evaluating: Callable[[], AbstractContextManager[DiffusionModel]]
    """The model as a saved file would make it, for a `with` block: no gradients, no dropout, the optimizer's evaluation
    weights. Whatever is done in the block, training goes on as if it had not been, as long as randomness is keyed."""
    validation_loss: Callable[[Sequence[float], int | None], float] | None
    """The mean loss on images that are held out from training, at these timesteps, with noise that is always the same;
    of so many batches, or all where that is None. None where no images are held out."""
    paths: Mapping[str, str] = field(factory=dict)
    """The place in a pipeline of diffusers of each adapted layer, `unet.mid_block.…`, by its key in LoRA files."""
    tell: Callable[..., None]
    """Tells all observers of an event, by the name of its method: `tell("previews_drawn", step, paths)`."""
    training_seconds: Callable[[], float]
    """Seconds that steps have taken since the run started: saves, previews and validation are not counted."""


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
    """What else the network has measured after this step, by the names of curves: `norm/avg_key_norm`."""


@frozen
class Every:
    """When an observer acts: after every so many epochs or steps; never, where a number is None."""

    epochs: int | None = None
    steps: int | None = None

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether it is time after an epoch; they count from 1."""
        return self.epochs is not None and epoch % self.epochs == 0

    def is_due_after_step(self, step: int) -> bool:
        """Whether it is time after a step; they count from 1."""
        return self.steps is not None and step % self.steps == 0


class Observer:
    """Told of a run's events; override those that matter."""

    def run_started(self, run: RunInfo) -> None:
        """The first step is about to begin."""

    def busy(self, what: str) -> None:
        """Something other than a step begins and may take a while: `drawing 5 previews of step 0`."""

    def step_finished(self, step: int) -> None:
        """A step is done and the adapters are updated; `step` counts from 1."""

    def metrics_read(self, metrics: StepMetrics) -> None:
        """The numbers of a step have arrived; in order, possibly some steps late, none left out but skipped steps."""

    def epoch_finished(self, epoch: int) -> None:
        """An epoch is done; `epoch` counts from 1."""

    def adapter_saved(self, path: Path) -> None:
        """A file with adapters has been written."""

    def state_saved(self, folder: Path) -> None:
        """All that is needed to go on from here has been written."""

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:
        """Pictures have been drawn with the adapters as they are after `step` steps, and written as PNG files."""

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """The loss on images that are not trained on has been measured after `step` steps.

        `losses` has their `average` and, once a step is done, how far it is above that of training, the `divergence`.
        """

    def run_finished(self) -> None:
        """All steps are done."""

    def closed(self) -> None:
        """The run is over, however it ended; always called last."""
