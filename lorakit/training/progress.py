"""How far something has come: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from typing import IO, Any, Protocol

from attrs import field, frozen

from lorakit.utils.wording import WIDTH, duration

SECONDS_BETWEEN_LINES = 30.0
"""How often progress is printed where the output is not a terminal."""
_NARROWEST_BAR = 10
_SECONDS_BETWEEN_BARS = 0.1
_STEPS_OF_PACE = 100


@frozen(kw_only=True)
class Position:
    """How far something has got, and what is known of it."""

    done: int
    total: int
    title: str = ""
    """What is done, if not training."""
    rate: float | None = None
    """How many are done in a second."""
    epoch: int | None = None
    loss: float | None = None
    learning_rates: Sequence[float] = ()
    busy: str = ""
    """What is being done instead of the next step."""

    @property
    def percent(self) -> int:
        """The share that is done; 100 only when all is."""
        return 100 * self.done // max(self.total, 1)

    @property
    def left(self) -> str:
        """The time left, if known."""
        return f"{duration((self.total - self.done) / self.rate)} left" if self.rate and self.done < self.total else ""


@frozen
class Pace:
    """How fast steps are, from when the last ones were done."""

    _samples: deque[tuple[int, float]] = field(factory=lambda: deque(maxlen=_STEPS_OF_PACE))

    def add(self, done: int, seconds: float) -> None:
        """Note how many were done after this many seconds."""
        self._samples.append((done, seconds))

    @property
    def rate(self) -> float | None:
        """Steps in a second, the slow first one not counted; None while that is unknown."""
        (first, began), (last, ended) = (self._samples[0], self._samples[-1]) if self._samples else ((0, 0.0),) * 2
        return (last - first) / (ended - began) if ended > began else None


def bar_text(position: Position, width: int) -> str:
    """The text beside a bar: as much of what is known as fits the width and leaves the bar its minimum."""
    room = width - len("100%|") - _NARROWEST_BAR - len("| ")
    texts = list(_texts(position))
    return next((text for text in texts if len(text) <= room), texts[-1])


def line_text(position: Position, now: datetime) -> str:
    """A line of a log: `16:38:12 step 83/150 (55 %), epoch 2, loss 0.0390, lr 9.2e-4, 3.1 steps/s, 21 s left`."""
    counted = f"{position.title or 'step'} {position.done}/{position.total} ({position.percent} %)"
    known = (_epoch(position), _loss(position), _rates(position), _speed(position), position.left)
    texts = (counted, position.busy) if position.busy else (counted, *known)
    return f"{now:%H:%M:%S} " + ", ".join(filter(None, texts))


def _texts(position: Position) -> Iterator[str]:
    """Texts for beside a bar, from the longest to the shortest."""
    counted = f"{position.done}/{position.total}"
    if position.busy:
        yield ", ".join((counted, position.busy))
    else:
        left, epoch, loss = position.left, _epoch(position), _loss(position)
        first_rate = _rates(position, only_first=True)
        yield ", ".join(filter(None, (counted, left, _speed(position), epoch, loss, _rates(position))))
        yield ", ".join(filter(None, (counted, left, epoch, loss, _rates(position))))
        yield ", ".join(filter(None, (counted, left, epoch, loss, first_rate)))
        yield ", ".join(filter(None, (counted, left, loss, first_rate)))
        yield ", ".join(filter(None, (counted, left, loss)))
        yield ", ".join(filter(None, (counted, left)))
    yield counted


def _epoch(position: Position) -> str:
    return "" if position.epoch is None else f"epoch {position.epoch}"


def _loss(position: Position) -> str:
    return "" if position.loss is None else f"loss {shown_loss(position.loss)}"


def _rates(position: Position, only_first: bool = False) -> str:
    shown = list(dict.fromkeys(map(short_number, position.learning_rates)))
    return f"lr {'/'.join(shown[:1] if only_first else shown)}" if shown else ""


def _speed(position: Position) -> str:
    if not position.rate or position.title:
        return ""
    return f"{position.rate:.1f} steps/s" if position.rate >= 1 else f"{1 / position.rate:.1f} s/step"


def shown_loss(loss: float) -> str:
    """A loss with enough digits to distinguish it: `0.0390`, `3.1e-5`."""
    return f"{loss:.4f}" if abs(loss) >= 0.001 or not loss else short_number(loss)


def short_number(number: float) -> str:
    """A number with two digits, without zeros that say nothing: `9.2e-4`, `1e-3`, `0.5`."""
    if not number or 0.01 <= abs(number) < 100:
        return f"{number:.2g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


class Display(Protocol):
    """Where progress is shown."""

    def show(self, position: Position, *, now: bool = False) -> None:
        """Show the progress: when it is time again, or `now`."""

    def say(self, text: str) -> None:
        """Show a message."""

    def close(self) -> None:
        """Leave what is shown as it is."""


def display(stream: IO[str] | None = None) -> Display:
    """A bar where the stream, or else standard error, is a terminal, and lines elsewhere."""
    stream = stream or sys.stderr
    return Bar(stream) if stream.isatty() else Lines(stream)


class Bar:
    """A bar on a terminal, under all messages."""

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds since any moment."""
        self._stream = stream
        self._clock = clock
        self._bar: Any = None
        self._position: Position | None = None
        self._drawn = 0.0
        self._redirection = ExitStack()

    def show(self, position: Position, *, now: bool = False) -> None:
        """Draw the bar: when the last time is a while ago, or `now`."""
        self._position = position
        if now or self._bar is None or self._clock() - self._drawn >= _SECONDS_BETWEEN_BARS:
            self._draw(position)

    def say(self, text: str) -> None:
        """Write a message above the bar."""
        from tqdm import tqdm

        tqdm.write(text, file=self._stream)

    def close(self) -> None:
        """Draw the bar for the last time, and leave it."""
        if self._bar is not None and self._position is not None:
            self._draw(self._position)
            self._bar.close()
            self._bar = None
        self._redirection.close()

    def _draw(self, position: Position) -> None:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        try:
            width = os.get_terminal_size(self._stream.fileno()).columns or WIDTH
        except (OSError, ValueError):
            width = WIDTH
        title = f"{position.title} ".replace("{", "{{").replace("}", "}}") if position.title else ""
        text = bar_text(position, width - len(title)).replace("{", "{{").replace("}", "}}")
        form = f"{title}{position.percent:3d}%|{{bar}}| {text}"
        if self._bar is None:
            # Warnings go above the bar, too, and not into its line.
            self._redirection.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(
                total=position.total, initial=position.done, file=self._stream, bar_format=form, ncols=width,
                miniters=position.total + 1, mininterval=float("inf"),
            )  # fmt: skip
        self._bar.n, self._bar.total, self._bar.ncols, self._bar.bar_format = position.done, position.total, width, form
        self._bar.refresh()
        self._drawn = self._clock()


class Lines:
    """Lines of a log, each with the time of day: one early, one every half minute, and one at the end."""

    def __init__(
        self,
        stream: IO[str],
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        """`clock` gives seconds since any moment."""
        self._stream = stream
        self._clock = clock
        self._time_of_day = time_of_day
        self._printed: Position | None = None
        self._due = 0.0

    def show(self, position: Position, *, now: bool = False) -> None:
        """Write a line, if it is time for one, or `now`."""
        is_due = position.done == position.total or (position.rate is not None and self._clock() >= self._due)
        is_new = self._printed is None or self._printed.done != position.done
        if now or (is_due and is_new):
            self._due = self._clock() + SECONDS_BETWEEN_LINES
            self._printed = position
            print(line_text(position, self._time_of_day()), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Write a message with the time of day."""
        print(f"{self._time_of_day():%H:%M:%S} {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is left to say."""
