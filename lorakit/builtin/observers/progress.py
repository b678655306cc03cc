"""Progress: loss, learning rate, speed and time left, on a terminal as a bar and elsewhere as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen
from attrs import validators as v

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.observer import Observer, RunInfo, StepMetrics
from lorakit.utils.wording import counted, shown_path

if TYPE_CHECKING:
    from lorakit.training.progress import Display


@frozen(kw_only=True)
class ProgressConfig(ObserverConfig):
    """A progress bar in a terminal, else a line every 30 seconds; always active."""

    name = "progress"

    average: float = field(default=0.95, validator=[v.ge(0), v.lt(1)])
    """Smoothing of the displayed loss (exponential moving average); 0 shows the loss of each step."""

    def build(self, run_info: RunInfo) -> Progress:
        """The progress of one run, shown on standard error."""
        from lorakit.training.progress import display

        return Progress(self.average, run_info, display())


class Progress(Observer):
    """Shows how far a run has come, and what it has written and measured."""

    def __init__(self, average: float, run: RunInfo, display: Display) -> None:
        from lorakit.training.progress import Pace, Position

        self._average = average
        self._run = run
        self._display = display
        self._pace = Pace()
        self._position = Position(done=run.first_step, total=run.total_steps)
        self._lowest: tuple[float, str] | None = None
        self._rising: list[float] = []
        """The validation losses since the last one that did not rise, that one first."""
        self._is_open = False

    def run_started(self, run: RunInfo) -> None:  # noqa: ARG002
        """Draw the empty bar."""
        self._is_open = True
        self._display.show(self._position)

    def busy(self, what: str) -> None:
        """Show what happens instead of the next step."""
        if self._is_open:
            self._position = evolve(self._position, busy=what)
            self._display.show(self._position, now=True)

    def step_finished(self, step: int) -> None:
        """Move on by one."""
        self._pace.add(step, self._run.training_seconds())
        self._position = evolve(self._position, done=step, rate=self._pace.rate, busy="")
        self._display.show(self._position)

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Keep the newest numbers, to be shown with the next step."""
        previous = metrics.loss if self._position.loss is None else self._position.loss
        loss = self._average * previous + (1 - self._average) * metrics.loss
        rates = tuple(metrics.learning_rates.values())
        self._position = evolve(self._position, epoch=metrics.epoch, loss=loss, learning_rates=rates)

    def adapter_saved(self, path: Path) -> None:
        """Say where, above the bar."""
        self._say(f"saved {shown_path(path)}")

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Say how the loss compares with the lowest so far and with that of training, above the bar."""
        from lorakit.training.progress import shown_loss

        self._at_steps_again()
        loss, epochs = losses["average"], step / self._run.steps_per_epoch
        when = f"epoch {epochs:.0f}" if epochs.is_integer() and step else f"step {step}"
        notes = [f"training {shown_loss(loss - losses['divergence'])}"] if "divergence" in losses else []
        is_lowest = self._lowest is None or loss < self._lowest[0]
        if self._lowest is not None and not is_lowest:
            notes.append(f"the lowest was {shown_loss(self._lowest[0])}, {self._lowest[1]}")
        is_higher = bool(self._rising) and loss > self._rising[-1]
        self._rising = [*self._rising, loss] if is_higher else [loss]
        rises = len(self._rising) - 1
        if rises > 1:
            notes.append(f"risen {rises} times in a row, a sign of overfitting")
        so_far = ", the lowest so far" if self._lowest is not None and is_lowest else ""
        if is_lowest:
            self._lowest = loss, when
        self._say(f"{when}: validation loss {shown_loss(loss)}{so_far}" + (f" ({'; '.join(notes)})" if notes else ""))

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:
        """Say where, above the bar."""
        self._at_steps_again()
        if paths:
            self._say(f"{counted(len(paths), 'preview')} of step {step} in {shown_path(paths[0].parent)}")

    def closed(self) -> None:
        """Leave the bar as it is."""
        if self._is_open:
            self._at_steps_again()
            self._display.close()

    def _at_steps_again(self) -> None:
        """Show the steps again after something else was shown."""
        if self._position.busy:
            self._position = evolve(self._position, busy="")
            self._display.show(self._position)

    def _say(self, text: str) -> None:
        if self._is_open:
            self._display.say(text)


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """The progress bar."""
    return [ProgressConfig]
