"""What every command must do."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
from click.testing import CliRunner

from lorakit.api.command import CommandConfig
from lorakit.plugins.build import build_component
from lorakit.testing.contracts.component import HEAVY, ComponentContract


class CommandContract(ComponentContract):
    """What every command must do; the commands of a group, too.

    class TestCaption(CommandContract):
        config = CaptionCommand()
    """

    config: CommandConfig
    test_reads_back_from_a_config_file: Any = None  # no config has it

    def test_has_a_plain_name(self) -> None:
        """The name can be typed without thinking: lower-case letters, digits and -."""
        assert re.fullmatch(r"[a-z][a-z0-9-]*", self.config.name)

    def test_is_described_in_a_line(self) -> None:
        """The first line of the docstring is a whole sentence, as it stands alone in `lorakit --help`."""
        first = (type(self.config).__doc__ or "").strip().split("\n")[0]
        assert first.endswith("."), first

    def test_help_is_complete(self) -> None:
        """`--help` says what the command does, and what each of its options does."""
        for path, command in self.commands():
            result = CliRunner().invoke(command, ["--help"])
            assert result.exit_code == 0, result.output
            assert command.help, f"{path} needs a docstring"
            undocumented = [own.opts[0] for own in command.params if isinstance(own, click.Option) and not own.help]
            assert not undocumented, f"{path} has options without help"

    def test_refuses_unknown_options(self) -> None:
        """A misspelt option is wrong usage, unless the command takes options of other programs."""
        for path, command in self.commands():
            if not command.context_settings.get("ignore_unknown_options") and not isinstance(command, click.Group):
                result = CliRunner().invoke(command, ["--no-such-option"])
                assert result.exit_code == click.UsageError.exit_code, f"{path}: {result.output}"
                assert "--no-such-option" in result.output

    def test_builds_without_anything_heavy(self) -> None:
        """The help appears at once: torch and optional packages wait until the command does its work."""
        module, name = type(self.config).__module__, type(self.config).__qualname__
        program = f"import sys, {module} as m; m.{name}().build(); print(*sys.modules)"
        result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)  # noqa: S603
        assert not {*HEAVY, *self.config.requires} & set(result.stdout.split())

    def commands(self) -> Iterator[tuple[str, click.Command]]:
        """The command, and all commands below it, by what is typed to run them."""
        yield from _below(self.config.name, build_component(self.config))


def _below(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, own in command.commands.items():
            yield from _below(f"{path} {name}", own)
