"""Checkpoints: the adapters every N epochs or steps, and at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attrs import frozen

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.observer import Every, Observer, RunInfo
from lorakit.errors import NotSaved, OutputError
from lorakit.training.output.folder import save_with_fallback

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class CheckpointsConfig(ObserverConfig):
    """Saves the LoRA as set in [output]; always active."""

    name = "checkpoints"
    essential = True

    def build(self, run_info: RunInfo) -> Checkpoints:
        """The saves of one run."""
        return Checkpoints(run_info)


class Checkpoints(Observer):
    """Saves when it is time, and removes the oldest saves once a newer one is whole.

    If a save fails during training, that is logged, older ones stay, and training continues.
    """

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._output = run.config.output
        epochs = self._output.epochs_between_saves(run.total_epochs)
        self._every = Every(epochs, self._output.save_every_n_steps)
        self._saved = self._earlier_saves()

    def step_finished(self, step: int) -> None:
        """Save when the step is a multiple of `save_every_n_steps`; the last step is left to the end."""
        if self._every.is_due_after_step(step) and step < self._run.total_steps:
            self._save(self._stem_of_step(step))

    def epoch_finished(self, epoch: int) -> None:
        """Save every N epochs; the last epoch is left to the end."""
        if self._every.is_due_after_epoch(epoch) and epoch < self._run.total_epochs:
            self._save(self._stem_of_epoch(epoch))

    def run_finished(self) -> None:
        """Save under the plain name; what the output folder does not take, somewhere else.

        Raises NotSaved, which says where that is.
        """
        saves: list[Callable[[Path | None], Path]] = [partial(self._run.save_adapter, self._output.name)]
        if self._output.save_state or self._output.save_state_at_end:
            saves.append(self._run.save_state)
        refusals = []
        for save in saves:
            try:
                saved = save_with_fallback(save, self._output.name)
                refusals += [f"{saved.refusal} Until then it is in {saved.path}."] if saved.refusal else []
            except NotSaved as error:
                refusals.append(f"{error} No other place takes it either, so it is lost; earlier saves are kept.")
        if refusals:
            raise NotSaved(f"All steps are done, but {' '.join(refusals)}")

    def _save(self, stem: str) -> None:
        path = _tried(partial(self._run.save_adapter, stem))
        if self._output.save_state:
            _tried(self._run.save_state)
        if path is None:
            return
        self._saved.append(path)
        while self._output.keep_last and len(self._saved) > self._output.keep_last:
            oldest = self._saved.pop(0)
            try:
                oldest.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be removed: %s", oldest, error.strerror)

    def _earlier_saves(self) -> list[Path]:
        """The saves that are there of the steps before a resumed run's first one, oldest first."""
        done, per_epoch = self._run.first_step, self._run.steps_per_epoch
        by_steps, by_epochs = self._every.steps, self._every.epochs
        stems: dict[str, int] = {}
        if by_steps:
            stems |= {self._stem_of_step(step): step for step in range(by_steps, done + 1, by_steps)}
        if by_epochs:
            epochs = range(by_epochs, done // per_epoch + 1, by_epochs)
            stems |= {self._stem_of_epoch(epoch): epoch * per_epoch for epoch in epochs}
        suffix = self._run.config.saver.build().suffix
        paths = [self._output.dir / f"{stem}{suffix}" for stem in sorted(stems, key=stems.__getitem__)]
        return [path for path in paths if path.exists()]

    def _stem_of_step(self, step: int) -> str:
        return f"{self._output.name}-step{step:08d}"

    def _stem_of_epoch(self, epoch: int) -> str:
        return f"{self._output.name}-{epoch:06d}"


def _tried(save: Callable[[], Path]) -> Path | None:
    """Where something was saved; None, after a warning, if it could not be."""
    try:
        return save()
    except OutputError as error:
        log.warning("%s Training continues, and the next save tries again.", error)
        return None


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Checkpoints."""
    return [CheckpointsConfig]
