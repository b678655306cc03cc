"""The command line: parse, call, echo."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import lorakit
from lorakit.columns import columns
from lorakit.errors import OutputError

if TYPE_CHECKING:
    from lorakit.engine.preparation import PreparedRun
    from lorakit.errors import Problem
    from lorakit.plugins import Catalog

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().ensure_object(dict)["debug"] = True
        logging.getLogger("lorakit").setLevel(logging.DEBUG)


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=_set_debug,
        help="Show where an error came from.",
    )  # fmt: skip


class _Command(click.Command):
    """A command that takes --debug, as the group does, so that it may stand in either place."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params.append(_debug_option())


class _Group(click.Group):
    """The group of all commands."""

    command_class = _Command


@click.group(
    cls=_Group,
    params=[_debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(lorakit.__version__, prog_name="lorakit")
def cli() -> None:
    """Train LoRA adapters for Stable Diffusion.

    Start with `lorakit init`, which writes a commented config file.
    """


def with_config(command: CommandT) -> CommandT:
    """Give a command the CONFIG argument and the --set option."""
    override = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE",
        help="Override a key of the config: --set optimizer.lr=1e-4. May be given several times.",
    )  # fmt: skip
    argument = click.argument("config", type=click.Path(path_type=Path))
    return argument(override(command))


@cli.command(short_help="Train as a config file says.")
@with_config
@click.option(
    "--resume", is_flag=False, flag_value=Path(), type=click.Path(path_type=Path), metavar="[STATE_DIR]",
    help="Go on from a saved state: the one in STATE_DIR, or the newest of this run.",
)  # fmt: skip
def train(config: Path, overrides: tuple[str, ...], resume: Path | None) -> None:
    """Train as the file CONFIG says.

    Everything that can be checked before the model is read is checked first. Ctrl-C stops after the
    current step and saves a state; `--resume` goes on from there.
    """
    catalog = _catalog()
    prepared = _prepared(config, overrides, catalog)
    from lorakit.engine.assembly import train_prepared

    path = train_prepared(prepared, catalog, resume)
    if is_main_process():
        click.echo(f"Done: {path}")


@cli.command(short_help="Say all that is wrong with a config file.")
@with_config
def check(config: Path, overrides: tuple[str, ...]) -> None:
    """Say all that is wrong with the file CONFIG, reading no weights.

    Images, captions and the kind of model are looked at too.
    """
    prepared = _prepared(config, overrides, _catalog())
    images, held_out = prepared.images, sum(len(dataset.examples) for dataset in prepared.validation)
    validated = f", and {held_out} held out for validation" if held_out else ""
    click.echo(f"{config}: no problems; {images} image{'' if images == 1 else 's'}{validated}")


@cli.command(short_help="Encode images and captions into the cache.")
@with_config
def cache(config: Path, overrides: tuple[str, ...]) -> None:
    """Encode images and captions into the cache, and stop."""
    catalog = _catalog()
    prepared = _prepared(config, overrides, catalog)
    from lorakit.engine.assembly import fill_cache

    fill_cache(prepared)
    if is_main_process():
        click.echo(f"Done: {prepared.config.cache_dir}")


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    from lorakit.planning.sizes import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@cli.command(short_help="Say what a run will take: steps, memory, time.")
@with_config
@click.option(
    "--memory", callback=_bytes, metavar="SIZE",
    help="How much memory there is to train in, such as 8GB or 8; what to set so that the run fits is said.",
)  # fmt: skip
@click.option("--measure", is_flag=True, help="Read the model and take a few steps of each size, for times.")
def plan(config: Path, overrides: tuple[str, ...], memory: int | None, measure: bool) -> None:
    """Say what a run of the file CONFIG will take: steps, memory and, with --measure, time.

    Memory is estimated without reading weights, for the config as it is and for each rung of the ladder
    of keys that save memory.
    """
    prepared = _prepared(config, overrides, _catalog())
    from lorakit.planning.plan import make_plan
    from lorakit.planning.report import data_report, report

    for line in (*data_report(prepared), "") if is_main_process() else ():
        click.echo(line)
    made = make_plan(prepared, measured=measure)
    for line in report(made, memory) if is_main_process() else ():
        click.echo(line)


@cli.command(short_help="Write a commented config file to start from.")
@click.argument("path", type=click.Path(path_type=Path), default=Path("config.toml"))
def init(path: Path) -> None:
    """Write a commented config file to start from (PATH, or config.toml)."""
    from lorakit.config.writing import starter
    from lorakit.files import write_atomically

    if path.exists():
        raise OutputError(f"{path} exists already; give another name, or remove it first")
    write_atomically(path, starter(_catalog()).encode())
    click.echo(f"Wrote {path}. Set model.path and data.image_dir in it, then: lorakit train {path}")


@cli.command(
    "from-kohya",
    short_help="Turn a command line of sd-scripts into a config file.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "-o", "output", type=click.Path(path_type=Path), metavar="CONFIG",
    help="Where to write the config; standard output when absent. Stands in front of ARGS.",
)  # fmt: skip
@click.argument("arguments", metavar="ARGS...", nargs=-1, required=True, type=click.UNPROCESSED)
def from_kohya(output: Path | None, arguments: tuple[str, ...]) -> None:
    """Turn a command line of sd-scripts' train_network.py into a config file that trains the same.

    ARGS is the whole line, `accelerate launch … train_network.py …`, or its options alone; in quotation
    marks it may be pasted with its line breaks. `--config_file X.toml` is read too. Options that have no
    counterpart are listed on standard error and in the file.
    """
    from lorakit.files import write_atomically
    from lorakit.kohya.command_line import read_arguments
    from lorakit.kohya.conversion import check, convert
    from lorakit.kohya.writing import to_text

    if output and output.exists():
        raise OutputError(f"{output} exists already; give another name, or remove it first")
    catalog, target = _catalog(), output.absolute().parent if output else Path.cwd()
    draft = convert(read_arguments(arguments, Path.cwd()), Path.cwd(), target, catalog)
    if output:
        write_atomically(output, to_text(draft).encode())
        click.echo(f"Wrote {output}. Next: lorakit train {output}")
    else:
        click.echo(to_text(draft), nl=False)
    for warning in (*draft.remarks, *check(draft, target, catalog)):
        click.secho(f"warning: {warning}", fg="yellow", err=True)


@cli.command(short_help="List all plugins, the broken ones too.")
def plugins() -> None:
    """List all plugins: kind, name, package and version; and those that are broken, with the reason."""
    from lorakit.discovery import REGISTRATION_HOOKS
    from lorakit.plugins import missing_packages

    catalog = _catalog()
    rows = []
    for base in REGISTRATION_HOOKS.values():
        for name, registrations in catalog.of_kind(base).items():
            for registration in registrations:
                missing = missing_packages(registration.component)
                notes = [f"needs: pip install {' '.join(missing)}"] if missing else []
                if len(registrations) > 1:
                    notes.append(f"name clash: write {registration.provider.distribution}:{name}")
                rows.append((base.kind, name, str(registration.provider), "; ".join(notes)))
    rows += [
        ("broken plugin", plugin.provider.entry_point, str(plugin.provider), plugin.error) for plugin in catalog.broken
    ]
    for line in columns(("kind", "name", "package", ""), rows):
        click.secho(line, fg="red" if line.startswith("broken") else None)


def is_main_process() -> bool:
    """Whether this process speaks to the user; launchers number the processes of a run."""
    return os.environ.get("RANK", "0") == "0"


def _catalog() -> Catalog:
    from lorakit.plugins import Catalog

    return Catalog.discover()


def _prepared(path: Path, overrides: tuple[str, ...], catalog: Catalog) -> PreparedRun:
    """The run of a config file, ready to start; prints each warning once."""
    from lorakit.config.reading import read_config
    from lorakit.engine.preparation import prepare

    config = read_config(path, overrides, catalog)
    _print_warnings(config.warnings())
    prepared = prepare(config)
    _print_warnings(prepared.warnings)
    return prepared


def _print_warnings(warnings: Iterable[Problem]) -> None:
    for warning in warnings if is_main_process() else ():
        click.secho(f"warning: {warning}", fg="yellow", err=True)
