"""Ctrl-C and SIGTERM: the first asks the run to stop after the step, the second ends the process at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the run is asked to stop, by a signal or by an event that any thread can set."""

    def __init__(self, event: threading.Event | None = None) -> None:
        self.signalled = False
        """Whether a signal has asked; it sets no event, as it may come while the main thread holds the event's lock."""
        self._event = event

    @property
    def is_asked(self) -> bool:
        """Whether the run is to stop after the step."""
        return self.signalled or (self._event is not None and self._event.is_set())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests inside the block; signals reach the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signalled = True
        # The system's own handling works within one long operation of PyTorch, too, where Python runs no handlers.
        # Nothing needs to be tidied up: files get their names when they are complete.
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        log.warning("%s: finishing this step and saving a state; once more stops at once, without saving", name)
