"""A series of runs: all checked before the first begins, then trained one after the other, each in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import Factory, frozen

from lorakit.config.load import read_config
from lorakit.config.train_config import TrainConfig
from lorakit.data.cache.store import Cache
from lorakit.errors import ConfigError, Interrupted, Problem
from lorakit.plugins.catalog import Catalog
from lorakit.training.checkpoint.state import has_ended, state_folder, states_in
from lorakit.training.prepare import prepare
from lorakit.training.report import config_hash


@frozen
class PlannedRun:
    """One run of a series."""

    label: str
    """What tables call it."""
    source: Path
    """Its config file."""
    overrides: tuple[str, ...]
    """What is changed in it: `optimizer.lr=1e-4`."""
    config: TrainConfig
    total_steps: int
    """Its optimizer steps."""

    @property
    def report(self) -> Path:
        """Where its report is written."""
        return self.config.output.dir / f"{self.config.output.name}.report.json"


@frozen
class FinishedRun:
    """A run of a series that has been trained, or has failed."""

    run: PlannedRun
    status: int
    """The exit status of its process; 0 for a run that was finished before."""
    report: Mapping[str, Any]
    """What it came to, as `lorakit.training.report` describes; empty if its process ended without saying."""


@frozen
class Planner:
    """Checks the runs of a series like `lorakit check`; images that several runs have are looked at once."""

    catalog: Catalog
    resuming: bool = False
    """Whether the series goes on."""
    _caches: dict[Path, Cache] = Factory(dict)

    def plan(self, label: str, source: Path, overrides: Sequence[str]) -> PlannedRun:
        """A run that can be trained. Raises the errors of `lorakit.errors`."""
        config = read_config(source, overrides, self.catalog)
        cache = self._caches.setdefault(config.cache_dir, Cache(config.cache_dir))
        length = prepare(config, resuming=self.resuming, cache=cache).length
        return PlannedRun(label, source, tuple(overrides), config, length.total_steps)


def check_names(runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError where two runs would write the same files."""
    places: dict[Path, PlannedRun] = {}
    problems = []
    for run in runs:
        other = places.setdefault((run.config.output.dir / run.config.output.name).absolute(), run)
        if other is not run:
            message = f"{other.label} and {run.label} would write the same files, {run.config.output.name}"
            problems.append(Problem("output.name", message, "give each run another output.name or output.dir"))
    if problems:
        raise ConfigError(problems)


def is_finished(run: PlannedRun) -> bool:
    """Whether a run with this very config has been trained to its end, and its file is still there."""
    report = read_report(run)
    file = report.get("file")
    done = report.get("config") == config_hash(run.config) and report.get("error") == ""
    return bool(done and report.get("steps") == run.total_steps and file and Path(file).is_file())


def read_report(run: PlannedRun) -> Mapping[str, Any]:
    """The report of a run; empty if there is none."""
    try:
        found = json.loads(run.report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def train_runs(runs: Sequence[PlannedRun], *, resume: bool, launcher: Sequence[str] = ()) -> Iterator[FinishedRun]:
    """Train one run after the other; one that fails does not keep the others from being trained.

    With `resume`, runs that are finished are not trained again, and one that was stopped goes on from its state.
    `launcher` is what starts each on several processes: `("accelerate", "launch")`. Raises Interrupted once a run is
    stopped by a signal.
    """
    for run in runs:
        if resume and is_finished(run):
            yield FinishedRun(run, 0, read_report(run))
            continue
        run.report.unlink(missing_ok=True)
        states = states_in(state_folder(run.config)) if resume else []
        goes_on = bool(states) and not has_ended(states[-1], run.total_steps)
        status = _train(_command(run, launcher, goes_on=goes_on))
        if status == Interrupted.exit_status:
            raise Interrupted(f"Stopped in the run {run.label}", state_folder(run.config), is_found=True)
        yield FinishedRun(run, status, read_report(run))


def _command(run: PlannedRun, launcher: Sequence[str], *, goes_on: bool) -> list[str]:
    options = [f"--set={override}" for override in run.overrides]
    options += [f"--report={run.report.absolute()}", *(["--resume"] if goes_on else [])]
    return [*(launcher or [sys.executable]), "-m", "lorakit", "train", str(run.source), *options]


def _train(command: Sequence[str]) -> int:
    """Run a command, which gets the signals that this process gets meanwhile; returns its exit status."""
    # In a group of its own, so that a terminal's Ctrl-C does not reach it twice: a second one would end it at once.
    group: dict[str, Any] = {} if sys.platform == "win32" else {"process_group": 0}
    process = subprocess.Popen(command, **group)  # noqa: S603 - lorakit's own
    with _forwarding(process) as received:
        status = process.wait()
    if status and received:  # also where it came before the process could listen, and ended it
        return Interrupted.exit_status
    return 128 - status if status < 0 else status


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Send on SIGINT and SIGTERM while the block lasts, and list those that came."""
    received: list[int] = []
    if sys.platform == "win32":  # the console tells all of its processes
        yield received
        return

    def send_on(number: int, _: object) -> None:
        received.append(number)
        os.kill(process.pid, number)

    before = {number: signal.signal(number, send_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
