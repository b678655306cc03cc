"""Checkpoints: the adapters every so many epochs or steps, and at the end."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from lorakit import hookimpl
from lorakit.components import ObserverConfig
from lorakit.engine.observing import Every, Observer, RunInfo


@frozen(kw_only=True)
class CheckpointsConfig(ObserverConfig):
    """Saves of the adapters, as [output] says; every run has them."""

    name = "checkpoints"
    essential = True

    def build(self, run_info: RunInfo) -> Checkpoints:
        """The saves of one run."""
        return Checkpoints(run_info)


class Checkpoints(Observer):
    """Saves when it is time, and removes the oldest saves once a newer one is whole."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._output = run.config.output
        ratio = self._output.save_n_epoch_ratio
        epochs = max(1, run.total_epochs // ratio) if ratio else self._output.save_every_n_epochs
        self._every = Every(epochs, self._output.save_every_n_steps)
        self._saved = self._earlier_saves()

    def step_finished(self, step: int) -> None:
        """Save when the step is a multiple of `save_every_n_steps`; the last step is left to the end."""
        if self._every.is_due_after_step(step) and step < self._run.total_steps:
            self._save(self._stem_of_step(step))

    def epoch_finished(self, epoch: int) -> None:
        """Save every so many epochs; the last epoch is left to the end."""
        if self._every.is_due_after_epoch(epoch) and epoch < self._run.total_epochs:
            self._save(self._stem_of_epoch(epoch))

    def run_finished(self) -> None:
        """Save under the plain name."""
        self._run.save_adapter(self._output.name)
        if self._output.save_state or self._output.save_state_at_end:
            self._run.save_state()

    def _save(self, stem: str) -> None:
        self._saved.append(self._run.save_adapter(stem))
        if self._output.save_state:
            self._run.save_state()
        while self._output.keep_last and len(self._saved) > self._output.keep_last:
            self._saved.pop(0).unlink(missing_ok=True)

    def _earlier_saves(self) -> list[Path]:
        """The saves that are there of the steps before a resumed run's first one, oldest first."""
        done, per_epoch = self._run.first_step, self._run.steps_per_epoch
        stems = {self._stem_of_step(step): step for step in _multiples(self._every.steps, done)}
        epochs = _multiples(self._every.epochs, done // per_epoch)
        stems |= {self._stem_of_epoch(epoch): epoch * per_epoch for epoch in epochs}
        suffix = self._run.config.saver.build().suffix
        paths = [self._output.dir / f"{stem}{suffix}" for stem in sorted(stems, key=stems.__getitem__)]
        return [path for path in paths if path.exists()]

    def _stem_of_step(self, step: int) -> str:
        return f"{self._output.name}-step{step:08d}"

    def _stem_of_epoch(self, epoch: int) -> str:
        return f"{self._output.name}-{epoch:06d}"


def _multiples(every: int | None, last: int) -> range:
    """The multiples of a number up to the last one that counts."""
    return range(every, last + 1, every) if every else range(0)


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Checkpoints."""
    return [CheckpointsConfig]
