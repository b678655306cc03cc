"""Progress as text, on a terminal and in a log, from numbers; and as real runs show it."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from attrs import evolve, frozen

from lorakit.api.observer import Observer
from lorakit.builtin.observers.progress import Progress
from lorakit.training.observers import Observers
from lorakit.training.progress import Bar, Lines, Pace, Position, bar_text, line_text, short_number

HALF_WAY = Position(done=83, total=150, rate=3.1, epoch=2, loss=0.039, learning_rates=(9.2e-4,))
TWO_RATES = evolve(HALF_WAY, learning_rates=(9.2e-4, 4.6e-4))
NOW = datetime(2026, 5, 4, 16, 38, 12)


class Screen(io.StringIO):
    """A terminal that is not one."""

    def isatty(self) -> bool:
        """As a terminal says."""
        return True


def test_a_line_says_all() -> None:
    """A line of a log has the time of day, and what takes long stands in it instead of numbers."""
    expected = "16:38:12 step 83/150 (55 %), epoch 2, loss 0.0390, lr 9.2e-4, 3.1 steps/s, 22 s left"
    assert line_text(HALF_WAY, NOW) == expected
    drawing = Position(done=0, total=150, busy="drawing 5 previews of step 0")
    assert line_text(drawing, NOW) == "16:38:12 step 0/150 (0 %), drawing 5 previews of step 0"
    slow = Position(done=1, total=3, rate=0.1, title="encoding images")
    assert line_text(slow, NOW) == "16:38:12 encoding images 1/3 (33 %), 20 s left"
    assert "10.0 s/step" in line_text(Position(done=1, total=3, rate=0.1), NOW)


@pytest.mark.parametrize(
    ("position", "width", "expected"),
    [
        (TWO_RATES, 200, "83/150, 22 s left, 3.1 steps/s, epoch 2, loss 0.0390, lr 9.2e-4/4.6e-4"),
        (TWO_RATES, 80, "83/150, 22 s left, epoch 2, loss 0.0390, lr 9.2e-4/4.6e-4"),
        (TWO_RATES, 67, "83/150, 22 s left, epoch 2, loss 0.0390, lr 9.2e-4"),
        (evolve(TWO_RATES, done=9_983, total=20_000, rate=0.5), 80,
         "9983/20000, 5 h 34 min left, epoch 2, loss 0.0390, lr 9.2e-4"),
        (HALF_WAY, 48, "83/150, 22 s left, loss 0.0390"),
        (HALF_WAY, 30, "83/150"),
        (HALF_WAY, 5, "83/150"),
        (evolve(HALF_WAY, busy="validating"), 80, "83/150, validating"),
    ],
)  # fmt: skip
def test_what_stands_beside_a_bar(position: Position, width: int, expected: str) -> None:
    """As much as leaves the bar ten columns, and nothing cut off."""
    assert bar_text(position, width) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [(9.2e-4, "9.2e-4"), (1e-3, "1e-3"), (0.0, "0"), (1.0, "1"), (0.5, "0.5"), (1.5e-6, "1.5e-6"), (-2e-5, "-2e-5")],
)
def test_short_numbers(number: float, expected: str) -> None:
    """Two digits, and no zeros that say nothing."""
    assert short_number(number) == expected


def test_pace_is_of_the_last_steps_without_the_first() -> None:
    """The first step, which prepares, does not count, nor do steps of long ago; a pace of nothing is none."""
    pace = Pace()
    assert pace.rate is None
    pace.add(11, 60.0)
    assert pace.rate is None
    for number in range(1, 201):
        pace.add(11 + number, 60.0 + 2.0 * number)
    for number in range(1, 101):
        pace.add(211 + number, 460.0 + 0.5 * number)
    assert pace.rate == pytest.approx(2.0)


def test_lines_come_early_and_then_every_half_minute() -> None:
    """The first as soon as the pace is known, then one in 30 seconds, one at the end; without a carriage return."""
    stream, seconds = io.StringIO(), 0.0
    lines = Lines(stream, clock=lambda: seconds, time_of_day=lambda: NOW)
    lines.show(Position(done=0, total=100))
    for done in range(1, 101):
        seconds += 1
        lines.show(Position(done=done, total=100, rate=1.0 if done > 1 else None))
    lines.show(Position(done=100, total=100, rate=1.0))
    lines.say("saved x")
    said = stream.getvalue()
    assert re.findall(r"step (\d+)/100", said) == ["2", "32", "62", "92", "100"]
    assert said.endswith("\n16:38:12 saved x\n")
    assert "\r" not in said


def test_a_bar_fits_and_leaves_messages_their_lines() -> None:
    """No frame is wider than the terminal; messages and warnings of other modules stand alone in their lines."""
    screen = Screen()
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    bar = Bar(screen, clock=lambda: 0.0)
    root.addHandler(handler)
    try:
        bar.show(Position(done=0, total=150))
        bar.show(TWO_RATES, now=True)
        bar.say("saved {x}")
        bar.show(evolve(HALF_WAY, busy="drawing {curly}"), now=True)
        bar.close()
        assert handler in root.handlers
    finally:
        root.removeHandler(handler)
    frames = re.split(r"[\r\n]", screen.getvalue())
    assert max(map(len, frames)) <= 80
    assert "saved {x}" in frames
    assert any(frame.startswith(" 55%|") and frame.endswith("lr 9.2e-4/4.6e-4") for frame in frames)
    assert any("83/150, drawing {curly}" in frame for frame in frames)


class Shown:
    """A display that keeps what it is given."""

    def __init__(self) -> None:
        self.positions: list[Position] = []
        self.said: list[str] = []

    def show(self, position: Position, *, now: bool = False) -> None:  # noqa: ARG002
        """Kept."""
        self.positions.append(position)

    def say(self, text: str) -> None:
        """Kept."""
        self.said.append(text)

    def close(self) -> None:
        """Nothing."""


class Slow(Observer):
    """Takes its time after each second step."""

    def __init__(self, wait: Callable[[float], None]) -> None:
        self.wait = wait

    def run_started(self, run: Any) -> None:  # noqa: ARG002
        """As previews before the first step do."""
        self.wait(75.0)

    def step_finished(self, step: int) -> None:
        """As previews do."""
        self.wait(40.0 if step % 2 == 0 else 0.0)


@frozen
class Known:
    """What the progress observer asks of a run."""

    total_steps: int = 30
    first_step: int = 0
    steps_per_epoch: int = 10
    training_seconds: Callable[[], float] = float


def test_time_left_does_not_count_what_is_not_a_step() -> None:
    """Previews of 75 and 40 seconds beside steps of one second leave the time that is left as it is; resumed too."""
    seconds = [0.0]

    def wait(time: float) -> None:
        seconds[0] += time

    observers = Observers((), clock=lambda: seconds[0])
    run = Known(first_step=10, training_seconds=observers.training_seconds)
    shown = Shown()
    observers.add("progress", Progress(0.0, run, shown))
    observers.add("slow", Slow(wait))
    observers.start(run)
    for step in range(11, 21):
        wait(1.0)
        observers.notify("step_finished", step)
    assert (shown.positions[0].done, shown.positions[0].total) == (10, 30)
    assert shown.positions[-1].left == "10 s left"
    assert observers.training_seconds() == pytest.approx(10.0)


def test_validation_in_words() -> None:
    """Each validation says how it compares with the lowest before it and with training."""
    shown = Shown()
    run = Known(steps_per_epoch=4)
    progress = Progress(0.0, run, shown)
    progress.run_started(run)
    for step, average, divergence in ((4, 0.05, 0.01), (8, 0.0312, 0.0082), (10, 0.04, -1e-6), (12, 0.031, 0.0)):
        progress.validated(step, {"average": average, "divergence": divergence})
    for step, average in ((16, 0.04), (20, 0.05), (24, 0.05), (28, 0.06)):
        progress.validated(step, {"average": average})
    assert shown.said == [
        "epoch 1: validation loss 0.0500 (training 0.0400)",
        "epoch 2: validation loss 0.0312, the lowest so far (training 0.0230)",
        "step 10: validation loss 0.0400 (training 0.0400; the lowest was 0.0312, epoch 2)",
        "epoch 3: validation loss 0.0310, the lowest so far (training 0.0310)",
        "epoch 4: validation loss 0.0400 (the lowest was 0.0310, epoch 3)",
        "epoch 5: validation loss 0.0500 (the lowest was 0.0310, epoch 3; risen 2 times in a row,"
        " a sign of overfitting)",
        "epoch 6: validation loss 0.0500 (the lowest was 0.0310, epoch 3)",
        "epoch 7: validation loss 0.0600 (the lowest was 0.0310, epoch 3)",
    ]


def command(tables: Mapping[str, Any], folder: Path) -> list[str]:
    """The command of a short run with previews that do not divide it, and held-out images."""
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\na dog --w 64 --h 64 --s 1\n")
    observers = [
        {"name": "samples", "prompts": "prompts.txt", "at_first": True, "every_n_steps": 4},
        {"name": "validation", "every_n_steps": 4},
    ]
    data = {**tables["data"], "validation_split": 0.25, "class_tokens": "photo of a place"}
    output = {"dir": "out", "name": "test", "save_every_n_steps": 2}
    own = {**tables, "data": data, "observers": observers, "output": output}
    (folder / "config.toml").write_text(tomlkit.dumps(own))
    return [sys.executable, "-m", "lorakit", "train", "config.toml"]


def on_a_terminal(arguments: list[str], folder: Path) -> str:
    """What a command writes to a terminal of 80 columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(arguments, cwd=folder, stdin=its, stdout=its, stderr=its)
    os.close(its)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_run_on_a_terminal_of_80_columns(tables: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is cut off or wider than the terminal; what is said before, meanwhile and at the end is there."""
    written = on_a_terminal(command(tables, tmp_path), tmp_path).replace("\r\n", "\n")
    frames = [frame for line in written.split("\n") for frame in line.split("\r") if frame.strip()]
    bars = [frame for frame in frames if re.match(r" *\d+%\|", frame)]
    assert max(map(len, bars)) <= 80
    assert min(frame.rindex("|") - frame.index("|") for frame in bars) >= 10
    assert any(re.search(r"\| 0/6, drawing 2 previews of step 0$", frame) for frame in bars)
    assert any(re.search(r"\| 6/6, .*loss \d\.\d{4}, lr 1e-3$", frame) for frame in bars)
    lines = [line.rpartition("\r")[2] for line in written.splitlines()]
    assert {
        "lorakit 0.1.0: config.toml -> out/test.safetensors",
        "saved out/test.safetensors",
        "2 previews of step 6 in out/sample",
    } <= set(lines)
    labels = [line[2:11].strip() for line in lines if re.match(r"  [a-z]", line)]
    assert labels == ["model", "images", "steps", "network", "device", "adapters", "previews", "use"]


def test_a_run_in_a_pipe(tables: dict[str, Any], tmp_path: Path) -> None:
    """Lines with the time of day, no bar; previews and validation once at the end, and what the run has come to."""
    done = subprocess.run(command(tables, tmp_path), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    assert "|" not in done.stderr
    assert re.search(r"^\d\d:\d\d:\d\d step 6/6 \(100 %\), epoch 2, loss \d\.\d{4}, lr 1e-3, ", done.stderr, re.M)
    assert re.findall(r"drawing 2 previews of step (\d)", done.stderr) == ["0", "4", "6"]
    assert re.findall(r"(step \d|epoch \d): validation loss", done.stderr) == ["step 4", "epoch 2"]
    first, lowest, previews, use, *_ = done.stdout.splitlines()
    assert re.fullmatch(r"Done in \d+ (s|min): out/test\.safetensors \(\d+ kB\), and 2 other saves", first)
    assert re.fullmatch(
        r"Lowest validation loss: (step 4, out/test-step00000004|epoch 2, out/test)\.safetensors", lowest
    )
    assert previews == "  previews out/sample/test_contact_sheet.png"
    assert use.startswith("  use      models/Lora: <lora:test:1> in AUTOMATIC1111, Forge;")
    assert " ".join(done.stdout.split()).endswith("models/loras in ComfyUI; words: photo of a place")
