"""Ctrl-C and SIGTERM: the first asks the run to stop after the step, the second stops at once."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lorakit.errors import Interrupted

log = logging.getLogger(__name__)

GRACE = 1.0
"""Seconds that a second signal leaves for tidying up; then the process ends, whatever it is doing."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the user has asked the run to stop, by a signal or by an event that any thread can set."""

    def __init__(self) -> None:
        self.made = False
        self.event: threading.Event | None = None
        """Set by a program that wants the run to stop, from whatever thread."""
        self.status: Callable[[], str] = lambda: "Stopped."
        """What to say when a second request stops everything at once; called from a signal handler, or a thread."""

    @property
    def is_asked(self) -> bool:
        """Whether the run is to stop after the step."""
        # A signal does not set the event: it may come while the main thread holds the event's lock.
        return self.made or (self.event is not None and self.event.is_set())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests while inside; signals reach the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            with _ended_by_the_second(self.status):
                yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt(self.status())
        self.made = True
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        log.warning("%s: finishing this step and saving a state; once more stops at once", name)


@contextmanager
def _ended_by_the_second(status: Callable[[], str]) -> Iterator[None]:
    """End the process `GRACE` seconds after a second signal, with a last word, unless what is inside has ended by then.

    Python runs handlers between its own instructions only, and one operation of PyTorch may take minutes. The system
    tells of signals at once through a socket, which a thread can read meanwhile.
    """
    told, telling = socket.socketpair()
    telling.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        count = 0
        while not over.is_set() and (numbers := told.recv(64)):
            count += sum(number in _SIGNALS for number in numbers)
            if count > 1 and not over.wait(GRACE):
                os.write(2, f"\n{status()}\n".encode(errors="backslashreplace"))
                os._exit(Interrupted.exit_status)

    thread = threading.Thread(target=watch, name="second signal", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        over.set()
        telling.close()
        thread.join()
        told.close()
