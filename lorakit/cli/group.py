"""`lorakit` itself: the commands that plugins register, and the options before them."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING

import click

from lorakit.cli.options import catalog
from lorakit.errors import PluginError

if TYPE_CHECKING:
    from lorakit.plugins.catalog import Registration


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().ensure_object(dict)["debug"] = True
        logging.getLogger("lorakit").setLevel(logging.DEBUG)


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from lorakit.cli.version import about

        click.echo(about())
        context.exit()


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=_set_debug,
        help="Show the full traceback on errors.",
    )  # fmt: skip


class CommandGroup(click.Group):
    """The group of all commands that plugins register; a command is built when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names of all commands: lorakit's in the order of work, then those of other packages."""
        return [*_registered()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, or of `distribution:name` where two packages provide it; None for an option."""
        from lorakit.api.command import CommandConfig
        from lorakit.plugins.build import build_component

        if cmd_name.startswith("-"):
            return None
        try:
            component = catalog().find(CommandConfig, cmd_name)
        except PluginError as error:
            raise click.UsageError(str(error), ctx) from error
        command: click.Command = build_component(component())
        command.name = cmd_name
        return _with_debug(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write what each command does, by heading."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for name, found in _registered().items():
            summary = (inspect.getdoc(found.component) or "").split("\n")[0]
            headings.setdefault(found.component.heading, []).append((name, summary))  # type: ignore[attr-defined]
        for heading, rows in headings.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _registered() -> dict[str, Registration]:
    """The registered commands by what is typed to run them."""
    from lorakit.api.command import CommandConfig

    all_found = [found for found in catalog().registrations if issubclass(found.component, CommandConfig)]
    all_found.sort(key=lambda found: not found.provider.is_of("lorakit"))
    return {catalog().full_name(found.component): found for found in all_found}


def _with_debug(command: click.Command) -> click.Command:
    """The command, and those of a group, with --debug, so that it can be given behind any of their names."""
    if not any(parameter.name == "debug" for parameter in command.params):
        command.params.append(_debug_option())
    if isinstance(command, click.Group):
        for own in command.commands.values():
            _with_debug(own)
    return command


@click.group(
    cls=CommandGroup,
    params=[_debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Example:
  lorakit init --images photos --model v1-5-pruned.safetensors
  lorakit check
  lorakit train
\b
The documentation is in the folder docs of the repository; start with
docs/index.md.""",
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
    help="Show the versions of lorakit, Python and PyTorch, and the GPU.",
)  # fmt: skip
def cli() -> None:
    """Train LoRA adapters for Stable Diffusion, FLUX.1, Chroma, Z-Image and Anima.

    Start with `lorakit init`, which writes a commented config file.
    """
