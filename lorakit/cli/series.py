"""Several runs in a row: `lorakit train A B`, and `lorakit sweep`."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from attrs import evolve

from lorakit.cli.options import ConfigCommand, catalog, print_warnings, with_config
from lorakit.errors import ConfigError, LorakitError, Problem

if TYPE_CHECKING:
    from lorakit.series.runs import FinishedRun, PlannedRun


def _launcher(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    """The words of a command line that starts with a program that is there."""
    try:
        words = shlex.split(value)
    except ValueError as error:  # quotation marks
        raise click.BadParameter(f"{value!r} is no command line: {str(error).lower()}") from error
    if words and shutil.which(words[0]) is None:
        raise click.BadParameter(f"there is no program {words[0]!r}; install it, or give its path")
    return words


@click.command(
    cls=ConfigCommand,
    epilog="""\b
Example:
  lorakit sweep config.toml --vary optimizer.lr=5e-5,1e-4 --vary network.rank=8,32""",
)
@with_config
@click.option(
    "--vary", multiple=True, required=True, metavar="KEY=V1,V2",
    help="A config key and the values to train with; with several, every combination. Repeatable.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Skip finished runs, and resume the one that was stopped.")
@click.option(
    "--launcher", default="", metavar="COMMAND", callback=_launcher,
    help="What starts each run on several processes: 'accelerate launch --num_processes 2'.",
)  # fmt: skip
def sweep(
    config: Path, overrides: tuple[str, ...], vary: tuple[str, ...], resume: bool, launcher: Sequence[str]
) -> None:
    """Train with every combination of some values of config keys, and compare the results.

    The runs are checked before the first begins, and trained one after the other, each in a process of its own; if one
    fails, the others are trained all the same. Each is named after its values. The table at the end is saved as
    NAME-sweep.csv and .md beside the results, and the last previews of all runs as NAME-sweep.png.
    """
    from lorakit.config.load import read_config
    from lorakit.series.vary import variations

    found = variations(vary)
    base = read_config(config, overrides, catalog()).output
    named = [(one, f"{base.name}-{one.suffix}") for one in found]
    runs = [(one.label, config, (*overrides, *one.overrides, f"output.name={name}")) for one, name in named]
    train_series(runs, resume=resume, results=base.dir / f"{base.name}-sweep", launcher=launcher)


def train_series(
    runs: Sequence[tuple[str, Path, tuple[str, ...]]],
    *,
    resume: bool,
    results: Path | None = None,
    launcher: Sequence[str] = (),
) -> None:
    """Plan runs, each a label, a config file and overrides, train them and echo what they came to.

    `results` is the path of the tables and the sheet, without extension; `runs` in the first run's folder if absent.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("a series starts its processes itself: run it without a launcher, and give --launcher")
    from lorakit.series.runs import check_names, is_finished, train_runs

    planned = _planned(runs, resume=resume)
    check_names(planned)
    steps = sum(run.total_steps for run in planned)
    click.echo(f"{len(planned)} runs, {steps} steps in all:")
    for run in planned:
        done = " (finished)" if resume and is_finished(run) else ""
        click.echo(f"  {run.label}: {run.total_steps} steps, {run.config.output.name}{done}")
    finished = []
    for number, found in enumerate(train_runs(planned, resume=resume, launcher=launcher), 1):
        finished.append(found)
        outcome = f"failed with status {found.status}" if found.status else "done"
        click.secho(f"Run {number} of {len(planned)}, {found.run.label}: {outcome}", bold=True)
    _echo_results(finished, results or planned[0].config.output.dir / "runs")


def _planned(runs: Sequence[tuple[str, Path, tuple[str, ...]]], *, resume: bool) -> list[PlannedRun]:
    """The runs, checked; raises ConfigError with the problems of all of them."""
    from lorakit.series.runs import Planner

    planner, planned, problems = Planner(catalog(), resume), [], []
    for label, source, overrides in runs:
        try:
            planned.append(planner.plan(label, source, overrides))
        except LorakitError as error:
            own = error.problems if isinstance(error, ConfigError) else (Problem("", str(error)),)
            # Of a file that cannot be read, the key is the file.
            problems += [
                evolve(one, key=one.key if one.key == label else f"{label}: {one.key}".rstrip(": ")) for one in own
            ]
    if problems:
        raise ConfigError(problems)
    print_warnings(dict.fromkeys(warning for run in planned for warning in run.config.warnings()))
    return planned


def _echo_results(finished: Sequence[FinishedRun], results: Path) -> None:
    """Echo the table, write it and the sheet, and exit with status 1 if a run has failed."""
    from lorakit.series.compare import TITLES, rows, write_previews, write_tables
    from lorakit.utils.text_table import columns
    from lorakit.utils.wording import shown_path

    click.echo("")
    for line in columns(TITLES, rows(finished)):
        click.echo(line)
    written = write_tables(results, finished)
    sheet = write_previews(results, finished)
    click.echo(f"Written to {', '.join(map(shown_path, [*written, *([sheet] if sheet else [])]))}")
    failed = sum(found.status != 0 for found in finished)
    if failed:
        raise click.exceptions.Exit(1)
