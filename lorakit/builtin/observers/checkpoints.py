"""Checkpoints: the adapters every so many epochs or steps, and at the end."""

from __future__ import annotations

from pathlib import Path

from attrs import field, frozen
from attrs import validators as v

from lorakit import hookimpl
from lorakit.components import ObserverConfig
from lorakit.engine.observing import Observer, RunInfo


@frozen(kw_only=True)
class CheckpointsConfig(ObserverConfig):
    """Saves of the adapters; every run has this observer, set up from [output]."""

    name = "checkpoints"
    essential = True

    every_n_epochs: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Save after every this many epochs; `output.save_every_n_epochs`."""
    every_n_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Save after every this many steps; `output.save_every_n_steps`."""
    keep_last: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """How many of the saves made along the way to keep; `output.keep_last`."""
    save_state: bool = False
    """With each save, save a state; `output.save_state`."""

    def build(self, run_info: RunInfo) -> Checkpoints:
        """The saves of one run."""
        return Checkpoints(self, run_info)


class Checkpoints(Observer):
    """Saves when it is time, and removes the oldest saves once a newer one is whole."""

    def __init__(self, config: CheckpointsConfig, run: RunInfo) -> None:
        self._config = config
        self._run = run
        self._name = run.config.output.name
        self._saved: list[Path] = []

    def step_finished(self, step: int) -> None:
        every = self._config.every_n_steps
        if every and step % every == 0 and step < self._run.total_steps:
            self._save(f"{self._name}-step{step:08d}")

    def epoch_finished(self, epoch: int) -> None:
        every = self._config.every_n_epochs
        if every and epoch % every == 0 and epoch < self._run.total_epochs:
            self._save(f"{self._name}-{epoch:06d}")

    def run_finished(self) -> None:
        self._run.save_adapter(self._name)
        if self._config.save_state:
            self._run.save_state()

    def _save(self, stem: str) -> None:
        path = self._run.save_adapter(stem)
        if self._config.save_state:
            self._run.save_state()
        self._saved.append(path)
        while self._config.keep_last and len(self._saved) > self._config.keep_last:
            self._saved.pop(0).unlink(missing_ok=True)


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Checkpoints."""
    return [CheckpointsConfig]
