"""What commands share: the config argument, the plugins, warnings, and who speaks to the user."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lorakit.errors import Problem
    from lorakit.plugins.catalog import Catalog
    from lorakit.training.prepare import PreparedRun

DEFAULT_CONFIG = Path("config.toml")
"""The config that is written and read when none is named."""

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class ConfigCommand(click.Command):
    """A command on a config file, which says how keys are set where they are given as options of their own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; a wrong option or argument that is like a key is answered with what to type."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            from lorakit.cli.usage import cure_of_arguments, cure_of_options
            from lorakit.config.load import known_keys

            cure = cure_of_arguments(given) if "extra argument" in error.message else ""
            if isinstance(error, click.NoSuchOption):
                own = [name for parameter in self.params for name in (*parameter.opts, "-h", "--help")]
                cure = cure_of_options(given, own, [*known_keys(catalog())])
            if not cure:
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}: {cure}", ctx) from error


def with_config(command: CommandT) -> CommandT:
    """Give a command the CONFIG argument and the --set option."""
    argument = click.argument("config", type=click.Path(path_type=Path), default=DEFAULT_CONFIG, callback=_config_file)
    return argument(_override_option(command))


def _override_option(command: CommandT) -> CommandT:
    option = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", shell_complete=_complete_key,
        help="Override a config key: --set optimizer.lr=1e-4; none unsets it. Repeatable.",
    )  # fmt: skip
    return option(command)


def with_configs(command: CommandT) -> CommandT:
    """Give a command one or more CONFIG arguments and the --set option."""
    argument = click.argument("configs", type=click.Path(path_type=Path), nargs=-1, callback=_config_files)
    return argument(_override_option(command))


def _config_files(context: click.Context, parameter: click.Parameter, value: tuple[Path, ...]) -> tuple[Path, ...]:
    """The config files; the default one must exist, and a key with a value is not one of them."""
    _refuse_settings(context, value)
    return value or (_config_file(context, parameter, DEFAULT_CONFIG),)


def _refuse_settings(context: click.Context, paths: Iterable[Path]) -> None:
    """Raise UsageError if KEY=VALUE is given in place of a config file."""
    from lorakit.cli.usage import cure_of_arguments

    given = [str(path) for path in paths]
    cure = cure_of_arguments(given) if any("=" in path and not os.path.exists(path) for path in given) else ""  # noqa: PTH110
    if cure and not context.resilient_parsing:
        raise click.UsageError(f"Got unexpected extra argument: {cure}", context)


def _config_file(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """The config file; the default name requires that it exists, and a key with a value is none."""
    _refuse_settings(context, [value])
    source = context.get_parameter_source(parameter.name or "")
    if source in (None, click.core.ParameterSource.DEFAULT) and not value.is_file() and not context.resilient_parsing:
        cure = f"there is no {value}, the default, in this folder; `lorakit init` writes one"
        raise click.UsageError(f"Missing argument 'CONFIG': {cure}", context)
    return value


def _complete_key(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """The keys that begin as what is typed, for shells that complete it."""
    from lorakit.config.load import known_keys

    return [f"{key}=" for key in known_keys(catalog()) if key.startswith(incomplete)]


def is_main_process() -> bool:
    """Whether this process speaks to the user; launchers number the processes of a run."""
    return os.environ.get("RANK", "0") == "0"


@cache
def catalog() -> Catalog:
    """All installed plugins, imported once."""
    from lorakit.plugins.catalog import Catalog

    return Catalog.discover()


def prepared_run(path: Path, overrides: tuple[str, ...], *, resuming: bool = False) -> tuple[PreparedRun, int]:
    """The run of a config file, ready to start, and how many warnings were printed, each once."""
    from lorakit.config.load import read_config
    from lorakit.training.prepare import prepare

    config = read_config(path, overrides, catalog())
    printed = print_warnings(config.warnings())
    prepared = prepare(config, resuming=resuming)
    return prepared, printed + print_warnings(prepared.warnings)


def print_warnings(warnings: Iterable[Problem]) -> int:
    """Print warnings, on the main process; gives how many there are."""
    from lorakit.utils.wording import printable, with_short_paths

    listed = list(warnings)
    for warning in listed if is_main_process() else ():
        click.secho(f"warning: {printable(with_short_paths(str(warning)))}", fg="yellow", err=True)
    return len(listed)
