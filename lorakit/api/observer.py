"""Observers: what is told how a run goes, and how they are told.

Observers run on the main process only. An event is one frozen value; numbers in it are plain floats,
read from the device some steps late where reading at once would make the device wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from lorakit.config.train_config import TrainConfig
from lorakit.errors import TrainingDiverged

if TYPE_CHECKING:
    from lorakit.models.interfaces import DiffusionModel

log = logging.getLogger(__name__)


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
    validation_loss: Callable[[Sequence[int], int | None], float] | None
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


class Observers:
    """All observers of a run; one that fails is named and detached, unless the run needs it."""

    def __init__(
        self,
        observers: Iterable[tuple[str, bool, Observer]] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`observers` gives each one's name, whether the run needs it, and itself; `clock`, seconds."""
        self._observers = list(observers)
        self._detached: list[tuple[str, bool, Observer]] = []
        self._unaware: list[tuple[str, bool, Observer]] = []
        self._held_back: list[tuple[tuple[str, bool, Observer], str, tuple[object, ...]]] = []
        self._meddled: set[tuple[str, str]] = set()
        self._clock = clock
        self._trained = 0.0
        self._since = clock()
        self._telling = 0

    def add(self, name: str, observer: Observer, *, first: bool = False) -> None:
        """One more, which the run can do without; told of each event last, or `first`."""
        self._observers.insert(0 if first else len(self._observers), (name, False, observer))

    def start(self, run: RunInfo) -> None:
        """Tell all that a run starts; what one of them tells meanwhile, the others hear once they know of the run."""
        self._unaware = list(self._observers)
        with self._pausing():
            try:
                for entry in list(self._observers):
                    self._tell(entry, "run_started", run)
                    self._unaware.remove(entry)
            finally:
                self._unaware = []
            for entry, event, values in self._held_back:
                if entry in self._observers:
                    self._tell(entry, event, *values)
        self._trained = 0.0

    def training_seconds(self) -> float:
        """Seconds since the start in which no observer was told of anything."""
        return self._trained + (0.0 if self._telling else self._clock() - self._since)

    def tell(self, event: str, *values: object) -> None:
        """Call the method named `event` of each observer. Raises ValueError if there is no such event."""
        if not hasattr(Observer, event):
            raise ValueError(f"there is no event {event!r}")
        with self._pausing():
            for entry in list(self._observers):
                if entry in self._unaware:
                    self._held_back.append((entry, event, values))
                elif entry not in self._detached:
                    self._tell(entry, event, *values)

    def close(self) -> None:
        """Tell all that the run is over, those that were detached too, whatever one of them raises."""
        with ExitStack() as stack:
            for entry in reversed([*self._observers, *self._detached]):
                stack.callback(self._tell, entry, "closed")

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """Stop the clock of training while observers are told of something, and of what they tell meanwhile."""
        if not self._telling:
            self._trained += self._clock() - self._since
        self._telling += 1
        try:
            yield
        finally:
            self._telling -= 1
            if not self._telling:
                self._since = self._clock()

    def _tell(self, entry: tuple[str, bool, Observer], event: str, *values: object) -> None:
        # Only here, because components import this module, and none of them torch.
        from lorakit.training.runtime.global_state import settings_put_back

        name, essential, observer = entry
        try:
            with settings_put_back() as changed:
                getattr(observer, event)(*values)
            self._name_meddler(name, changed)
        except TrainingDiverged:
            raise
        except Exception as error:
            if essential:
                raise
            if entry not in self._detached:
                self._observers.remove(entry)
                self._detached.append(entry)
                log.warning("observer %r failed and is detached: %s: %s", name, type(error).__name__, error)

    def _name_meddler(self, name: str, changed: Iterable[str]) -> None:
        """Say once of each setting of PyTorch that an observer has changed, which is undone already."""
        for setting in changed:
            if (name, setting) not in self._meddled:
                self._meddled.add((name, setting))
                log.warning("observer %r calls %s, which would change what is trained; it is put back", name, setting)
