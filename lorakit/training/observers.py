"""Notifies the observers of a run.

Observers run on the main process only. One that fails is detached with a warning, unless the run needs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from lorakit.api.observer import Observer, RunInfo
from lorakit.errors import TrainingDiverged

log = logging.getLogger(__name__)


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
        name, essential, observer = entry
        try:
            getattr(observer, event)(*values)
        except TrainingDiverged:
            raise
        except Exception as error:
            if essential:
                raise
            if entry not in self._detached:
                self._observers.remove(entry)
                self._detached.append(entry)
                log.warning("observer %r failed and is detached: %s: %s", name, type(error).__name__, error)
