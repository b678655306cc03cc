"""The progress bar: loss, learning rate, speed and time left."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen
from attrs import validators as v

from lorakit import hookimpl
from lorakit.components import ObserverConfig
from lorakit.engine.observing import Observer, RunInfo, StepMetrics


@frozen(kw_only=True)
class ProgressConfig(ObserverConfig):
    """A progress bar on the terminal; every run has one."""

    name = "progress"

    average: float = field(default=0.95, validator=[v.ge(0), v.lt(1)])
    """How slowly the shown loss follows the loss of each step; 0 shows each step's own."""

    def build(self, run_info: RunInfo) -> Progress:  # noqa: ARG002
        """The progress bar of one run."""
        return Progress(self.average)


class Progress(Observer):
    """Draws the bar on standard error; where that is no terminal, a line now and then."""

    def __init__(self, average: float) -> None:
        self._average = average
        self._loss: float | None = None
        self._bar: Any = None

    def run_started(self, run: RunInfo) -> None:
        """Draw the empty bar."""
        from tqdm import tqdm

        interval = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=run.total_steps, initial=run.first_step, unit="step", dynamic_ncols=True, mininterval=interval
        )

    def step_finished(self, step: int) -> None:  # noqa: ARG002
        """Move on by one."""
        self._bar.update()

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Show the newest numbers."""
        previous = metrics.loss if self._loss is None else self._loss
        self._loss = self._average * previous + (1 - self._average) * metrics.loss
        rates = "/".join(dict.fromkeys(f"{rate:.2g}" for rate in metrics.learning_rates.values()))
        self._bar.set_postfix_str(f"epoch {metrics.epoch}, loss {self._loss:.4f}, lr {rates}", refresh=False)

    def adapter_saved(self, path: Path) -> None:
        """Say where, above the bar."""
        self._say(f"saved {path}")

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Show the losses, above the bar."""
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self._say(f"validation loss after step {step}: {shown}")

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:
        """Say where, above the bar."""
        if paths:
            self._say(f"{len(paths)} previews of step {step} in {paths[0].parent}")

    def closed(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """The progress bar."""
    return [ProgressConfig]
