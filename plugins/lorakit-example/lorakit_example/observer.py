"""The observer `loss_curve`."""

from __future__ import annotations

from pathlib import Path

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import Observer, ObserverConfig, RunInfo, StepMetrics, hookimpl


@frozen(kw_only=True)
class LossCurveConfig(ObserverConfig):
    """The loss of the run as a CSV file next to the LoRA file, with lines `step,loss`."""

    name = "loss_curve"

    every_n_steps: int = field(default=1, validator=v.ge(1))
    """Steps per line; each line has the mean loss of its steps."""

    def build(self, run_info: RunInfo) -> LossCurve:
        """The observer of one run."""
        output = run_info.config.output
        return LossCurve(output.dir / f"{output.name}-loss.csv", self.every_n_steps)


class LossCurve(Observer):
    """Adds a line to the file every few steps; a resumed run continues the file."""

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self._path = path
        self._every_n_steps = every_n_steps
        self._losses: list[float] = []

    def run_started(self, run: RunInfo) -> None:
        """Start a new file, unless the run is resumed."""
        if run.first_step == 0 or not self._path.exists():
            self._path.write_text("step,loss\n", encoding="utf-8")

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Losses arrive in order."""
        self._losses.append(metrics.loss)
        if metrics.step % self._every_n_steps == 0:
            mean = sum(self._losses) / len(self._losses)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{metrics.step},{mean:.6g}\n")
            self._losses.clear()


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """The loss as a CSV file."""
    return [LossCurveConfig]
