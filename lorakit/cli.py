"""The command line: parse, call, echo."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import lorakit
from lorakit.errors import ConfigError, Interrupted, LorakitError, OutputError, Problem

if TYPE_CHECKING:
    from lorakit.config.sections import TrainConfig
    from lorakit.plugins import Catalog

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(lorakit.__version__, prog_name="lorakit")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def cli(debug: bool) -> None:
    """Train LoRA adapters for Stable Diffusion.

    Start with `lorakit init`, which writes a commented config file.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("lorakit").setLevel(logging.DEBUG if debug else logging.INFO)


def with_config(command: CommandT) -> CommandT:
    """Give a command the CONFIG argument and the --set option."""
    override = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE",
        help="Override a key of the config: --set optimizer.lr=1e-4. May be given several times.",
    )  # fmt: skip
    argument = click.argument("config", type=click.Path(path_type=Path))
    return argument(override(command))


@cli.command()
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
    checked = _checked(config, overrides, catalog)
    from lorakit.engine.assembly import train_config

    path = train_config(checked, catalog, resume)
    click.echo(f"Done: {path}")


@cli.command()
@with_config
def check(config: Path, overrides: tuple[str, ...]) -> None:
    """Say all that is wrong with the file CONFIG, reading no weights.

    Images, captions and the kind of model are looked at too.
    """
    checked = _checked(config, overrides, _catalog())
    from lorakit.data.examples import index_datasets

    datasets = index_datasets(checked.data.datasets, checked.data.workers)
    images = sum(len(dataset.examples) for dataset in datasets)
    click.echo(f"{config}: no problems; {images} image{'' if images == 1 else 's'}")


@cli.command()
@with_config
def cache(config: Path, overrides: tuple[str, ...]) -> None:
    """Encode images and captions into the cache, and stop."""
    catalog = _catalog()
    checked = _checked(config, overrides, catalog)
    from lorakit.engine.assembly import fill_cache

    fill_cache(checked)
    click.echo(f"Done: {checked.cache_dir}")


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("config.toml"))
def init(path: Path) -> None:
    """Write a commented config file to start from (PATH, or config.toml)."""
    from lorakit.config.writing import starter

    if path.exists():
        raise OutputError(f"{path} exists already; give another name, or remove it first")
    try:
        path.write_text(starter(_catalog()), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"Wrote {path}. Set model.path and data.image_dir in it, then: lorakit train {path}")


@cli.command()
def plugins() -> None:
    """List all plugins: kind, name, package and version; and those that are broken, with the reason."""
    from lorakit.plugins import REGISTRATION_HOOKS, missing_packages

    catalog = _catalog()
    for base in REGISTRATION_HOOKS.values():
        click.secho(f"{base.kind}s", bold=True)
        for name, registrations in catalog.of_kind(base).items():
            for registration in registrations:
                notes = [f"needs: pip install {package}" for package in missing_packages(registration.component)]
                notes += ["name clash: write 'package:name'"] if len(registrations) > 1 else []
                note = f"  ({'; '.join(notes)})" if notes else ""
                click.echo(f"  {name:<24} {registration.provider}{note}")
    if catalog.broken:
        click.secho("broken plugins", bold=True, fg="red")
    for plugin in catalog.broken:
        click.echo(f"  {plugin.provider.entry_point:<24} {plugin.provider}: {plugin.error}")


def _catalog() -> Catalog:
    from lorakit.plugins import Catalog

    return Catalog.discover()


def _checked(path: Path, overrides: tuple[str, ...], catalog: Catalog) -> TrainConfig:
    """The config, with what has no effect in it said."""
    from lorakit.config.reading import read_config

    config = read_config(path, overrides, catalog)
    for warning in config.warnings():
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    return config


@contextmanager
def reporting_errors(debug: Callable[[], bool]) -> Iterator[None]:
    """Turn errors meant for the user into a message and an exit status."""
    try:
        yield
    except (LorakitError, KeyboardInterrupt) as error:
        if debug() and not isinstance(error, Interrupted):
            raise
        status = error.exit_status if isinstance(error, LorakitError) else Interrupted.exit_status
        click.echo(_message(error), err=True)
        sys.exit(status)


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Stopped."
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        listed = "".join(f"\n  {problem}" for problem in error.problems)
        return f"{len(error.problems)} problems:{listed}"
    return f"error: {error}"


def main() -> None:
    """Run the command line; ends the process with the exit status of the contract."""
    with reporting_errors(lambda: "--debug" in sys.argv):
        try:
            cli.main(standalone_mode=False)
        except click.exceptions.Abort as error:
            raise KeyboardInterrupt from error
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except MemoryError as error:
            hint = "use a smaller batch_size or resolution, or training.gradient_checkpointing = true"
            raise LorakitError(str(Problem("", "out of memory", hint))) from error
