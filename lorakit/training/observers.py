"""Notifies the observers of a run.

Most observers run on the main process only. One that fails is detached with a warning, unless the run needs it.
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
        self._notifying = 0

    def add(self, name: str, observer: Observer, *, essential: bool = False, first: bool = False) -> None:
        """Add one, notified of each event last, or `first`; the run fails with it only if it is `essential`."""
        self._observers.insert(0 if first else len(self._observers), (name, essential, observer))

    def start(self, run: RunInfo) -> None:
        """Notify all that a run starts; events that one causes meanwhile reach the others once they have started."""
        self._unaware = list(self._observers)
        with self._pausing():
            try:
                for entry in list(self._observers):
                    self._call(entry, "run_started", run)
                    self._unaware.remove(entry)
            finally:
                self._unaware = []
            for entry, event, values in self._held_back:
                if entry in self._observers:
                    self._call(entry, event, *values)
        self._trained = 0.0

    def training_seconds(self) -> float:
        """Seconds since the start without the time that observers took."""
        return self._trained + (0.0 if self._notifying else self._clock() - self._since)

    def notify(self, event: str, *values: object) -> None:
        """Call the method named `event` of each observer. Raises ValueError if there is no such event."""
        if not hasattr(Observer, event):
            raise ValueError(f"there is no event {event!r}")
        with self._pausing():
            for entry in list(self._observers):
                if entry in self._unaware:
                    self._held_back.append((entry, event, values))
                elif entry not in self._detached:
                    self._call(entry, event, *values)

    def close(self) -> None:
        """Notify all that the run is over, also those that were detached, whatever one of them raises."""
        with ExitStack() as stack:
            for entry in reversed([*self._observers, *self._detached]):
                stack.callback(self._call, entry, "closed")

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """Stop the clock of training while observers are notified, and of the events that they cause meanwhile."""
        if not self._notifying:
            self._trained += self._clock() - self._since
        self._notifying += 1
        try:
            yield
        finally:
            self._notifying -= 1
            if not self._notifying:
                self._since = self._clock()

    def _call(self, entry: tuple[str, bool, Observer], event: str, *values: object) -> None:
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
