"""The commands on one config: parse, call, echo."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lorakit.cli.options import (
    DEFAULT_CONFIG,
    ConfigCommand,
    catalog,
    is_main_process,
    prepared_run,
    print_warnings,
    with_config,
    with_configs,
)
from lorakit.errors import ConfigError, LorakitError, OutputError

if TYPE_CHECKING:
    from lorakit.training.prepare import PreparedRun


@click.command()
@click.option("--full", is_flag=True, help="Write every key with its default and description.")
@click.option(
    "--for", "preset", metavar="PRESET", default="subject", show_default=True,
    help="Preset with typical rank, steps and learning rates: subject, person, style, or one of a plugin.",
)  # fmt: skip
@click.option(
    "--images", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Image folder; the number of images determines repeats and epochs.",
)  # fmt: skip
@click.option("--model", metavar="MODEL", help="The base model: a file, a folder, or a Hub id.")
@click.option(
    "--optimizer", default="adamw", show_default=True, metavar="NAME",
    help="The optimizer; selects a typical learning rate for it.",
)  # fmt: skip
@click.argument("path", type=click.Path(path_type=Path), default=DEFAULT_CONFIG)
def init(path: Path, full: bool, **chosen: Any) -> None:
    """Write a commented config file to start from (PATH, or config.toml).

    It has the keys that a first LoRA needs, and prompts for previews beside it. With --full it has every key.
    """
    from lorakit.cli.init import full_config, plan_start, prompts_beside, short_config
    from lorakit.utils.atomic_io import write_atomically

    if path.exists():
        raise OutputError(f"{path} exists already; give another name, or remove it first")
    written, kept, prompts = [path], "", prompts_beside(path)
    if full:
        write_atomically(path, full_config(catalog(), path, chosen["images"], chosen["model"]).encode())
    else:
        start = plan_start(catalog(), **chosen)
        write_atomically(path, short_config(start, path).encode())
        if prompts.exists():
            kept = f"; kept {prompts}, which was there already"
        else:
            write_atomically(prompts, start.prompts().encode())
            written.append(prompts)
    needed = {"model.path": "model", "data.image_dir": "images"}
    missing = [key for key, option in needed.items() if not chosen[option]]
    todo = f"Set {' and '.join(missing)} in it, then" if missing else "Then"
    click.echo(f"Wrote {' and '.join(map(str, written))}{kept}. {todo}: lorakit check {path}")


@click.command(cls=ConfigCommand)
@with_config
def check(config: Path, overrides: tuple[str, ...]) -> None:
    """Validate the config file CONFIG and list every problem at once, without loading weights.

    Images, captions and the type of the base model are checked too.
    """
    prepared, warnings = prepared_run(config, overrides)
    _print_summary(prepared, config)
    from lorakit.training.summary import length_in_words
    from lorakit.utils.wording import counted

    held_out = sum(len(dataset.held_out) for dataset in prepared.datasets)
    validated = f", and {held_out} held out for validation" if held_out else ""
    doubts = f", {counted(warnings, 'warning')}" if warnings else ""
    images = counted(prepared.images, "image")
    click.echo(f"{config}: no problems{doubts}; {images}{validated}, {length_in_words(prepared.length)}")


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    from lorakit.utils.bytes import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(cls=ConfigCommand)
@with_config
@click.option(
    "--memory", callback=_bytes, metavar="SIZE",
    help="Memory budget, e.g. 8GB or 8; prints settings that make the run fit.",
)  # fmt: skip
@click.option("--measure", is_flag=True, help="Load the model and time a few steps of each image size.")
def plan(config: Path, overrides: tuple[str, ...], memory: int | None, measure: bool) -> None:
    """Estimate the steps, memory and, with --measure, time of a run.

    Memory is estimated without loading weights, for the current config and for each preset
    of settings that save memory.
    """
    prepared, _ = prepared_run(config, overrides)
    from lorakit.planning.plan import make_plan
    from lorakit.planning.report import data_report, report

    for line in (*data_report(prepared), "") if is_main_process() else ():
        click.echo(line)
    made = make_plan(prepared, measured=measure, for_gpu=memory is not None)
    for line in report(made, memory) if is_main_process() else ():
        click.echo(line)


@click.command(cls=ConfigCommand)
@with_config
def cache(config: Path, overrides: tuple[str, ...]) -> None:
    """Encode images and captions into the cache, and stop."""
    prepared, _ = prepared_run(config, overrides, resuming=True)  # it replaces no finished LoRA either
    from lorakit.training.setup import fill_cache
    from lorakit.utils.wording import shown_path

    filled = fill_cache(prepared)
    if is_main_process():
        click.echo(f"Done: {shown_path(prepared.config.cache_dir)}")
        for what in ("images", "captions"):
            done = f"{filled[what].new} encoded, {filled[what].there} there already" if what in filled else ""
            click.echo(f"  {what:<8} {done or 'are encoded in each step'}")


@click.command(cls=ConfigCommand)
@with_configs
@click.option(
    "--resume", is_flag=False, flag_value="latest", type=click.Path(path_type=Path), metavar="[STATE_DIR]",
    help="Resume from a saved state: the one in STATE_DIR, or the newest of this run.",
)  # fmt: skip
@click.option(
    "--report", "report_file", type=click.Path(path_type=Path), metavar="FILE",
    help="Write loss, validation loss, time, memory and files of the run to FILE, as JSON.",
)  # fmt: skip
def train(configs: tuple[Path, ...], overrides: tuple[str, ...], resume: Path | None, report_file: Path | None) -> None:
    """Train with the config file CONFIG; without one, with config.toml.

    The config, images and captions are validated before the model is loaded. Ctrl-C stops after the
    current step and saves a state; `--resume` continues from it.

    With several config files, train with one after the other, and compare the results as `lorakit sweep` does.
    """
    if resume and resume.suffix in (".toml", ".json") and resume.is_file():
        raise click.UsageError(f"--resume takes the folder of a state: write lorakit train {resume} --resume")
    latest = resume == Path("latest")
    if len(configs) > 1:
        if report_file or (resume and not latest):
            raise click.UsageError(
                "--report FILE and --resume STATE_DIR are for one config; --resume alone for several"
            )
        from lorakit.cli.series import train_series

        train_series([(str(path), path, overrides) for path in configs], resume=latest)
        return
    (config,) = configs
    from lorakit.training.report import RunReport, check_report_path

    if report_file:
        check_report_path(report_file)
    prepared, _ = prepared_run(config, overrides, resuming=resume is not None)
    _print_summary(prepared, config)
    from lorakit.training.setup import run_training
    from lorakit.training.summary import RunAccount

    account = RunAccount()
    report = RunReport(prepared.config, account)
    state: Path | Literal["latest"] | None = "latest" if latest else resume
    with report.written_to(report_file if is_main_process() else None):
        run_training(prepared, catalog(), state, observers=[account])
    for line in account.lines():
        click.echo(line)


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "-o", "output", type=click.Path(path_type=Path), metavar="CONFIG",
    help="Output file; standard output if absent. Must come before or after all ARGS.",
)  # fmt: skip
@click.argument("arguments", metavar="ARGS...", nargs=-1, required=True, type=click.UNPROCESSED)
def from_kohya(output: Path | None, arguments: tuple[str, ...]) -> None:
    """Convert a command line of sd-scripts to an equivalent config file.

    ARGS is the whole line, `accelerate launch … train_network.py …`, or that of sdxl_train_network.py,
    flux_train_network.py or anima_train_network.py, or its options alone; in quotation marks it may be pasted with
    its line breaks. `--config_file X.toml` is read too. Or ARGS are files, with or without options behind them: the
    .json or .toml that the GUI kohya_ss saves, the .toml files of lora-scripts and of Colab. Options that have no
    counterpart are listed on standard error and in the file.
    """
    from lorakit.config.load import config_from_tables
    from lorakit.kohya.command_line import read_arguments
    from lorakit.kohya.conversion import convert
    from lorakit.kohya.draft import to_text
    from lorakit.training.prepare import prepare
    from lorakit.utils.atomic_io import write_atomically
    from lorakit.utils.wording import with_short_paths

    if output is None and arguments[-2:-1] == ("-o",):
        output, arguments = Path(arguments[-1]), arguments[:-2]
    if output and output.exists():
        raise OutputError(f"{output} exists already; give another name, or remove it first")
    target = output.absolute().parent if output else Path.cwd()
    draft = convert(read_arguments(arguments, Path.cwd()), Path.cwd(), target, catalog())
    if output:
        write_atomically(output, to_text(draft).encode())
    else:
        click.echo(to_text(draft), nl=False)
    print_warnings(draft.remarks)
    problems: tuple[object, ...] = ()
    try:
        prepare(config_from_tables(draft.tables(), target, catalog()))
    except LorakitError as error:
        problems = error.problems if isinstance(error, ConfigError) else (error,)
    for problem in problems:
        click.secho(f"to fix: {with_short_paths(str(problem))}", fg="red", err=True)
    if output:
        cure = f"Fix the problems above, then: lorakit check {output}"
        click.echo(f"Wrote {output}. {cure if problems else f'Next: lorakit train {output}'}")


@click.command()
@click.argument("name", required=False)
def plugins(name: str | None) -> None:
    """List all components provided by plugins, and broken plugins with the reason.

    With NAME, such as lion, show the keys of that component; with a kind, such as optimizer, list those of the kind.
    """
    from lorakit.cli.listing import details, listing

    for line in details(catalog(), name) if name else listing(catalog()):
        click.secho(line.text, fg="red" if line.is_broken else None, bold=line.is_title)


def _print_summary(prepared: PreparedRun, source: Path) -> None:
    """Say what the run is going to do, on the main process."""
    from lorakit.training.summary import summarize_run

    for line in summarize_run(prepared, source) if is_main_process() else ():
        logging.getLogger(__name__).info("%s", line)
