"""The commands that come with lorakit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from lorakit.api import CommandConfig, hookimpl

if TYPE_CHECKING:
    import click


@frozen(kw_only=True)
class CommandOfModule(CommandConfig):
    """A command that is defined in a module of its own."""

    module: ClassVar[str]
    """The module, in which the command has its own name, with underscores for hyphens."""

    def build(self) -> click.Command:
        """The command of the module, which is imported now."""
        command: click.Command = getattr(import_module(self.module), self.name.replace("-", "_"))
        return command


@frozen(kw_only=True)
class InitCommand(CommandOfModule):
    """Write a commented config file to start from."""

    name = "init"
    heading = "Training"
    module = "lorakit.cli.commands"


@frozen(kw_only=True)
class CheckCommand(CommandOfModule):
    """Validate a config file and list every problem at once."""

    name = "check"
    heading = "Training"
    module = "lorakit.cli.commands"


@frozen(kw_only=True)
class DataCommand(CommandOfModule):
    """Report on images and captions, and draw them as they are trained."""

    name = "data"
    heading = "Data"
    module = "lorakit.cli.data"


@frozen(kw_only=True)
class CaptionCommand(CommandOfModule):
    """Write captions of images, or edit them."""

    name = "caption"
    heading = "Data"
    module = "lorakit.cli.caption"


@frozen(kw_only=True)
class PlanCommand(CommandOfModule):
    """Estimate steps, memory and time of a run."""

    name = "plan"
    heading = "Training"
    module = "lorakit.cli.commands"


@frozen(kw_only=True)
class CacheCommand(CommandOfModule):
    """Encode images and captions into the cache."""

    name = "cache"
    heading = "Training"
    module = "lorakit.cli.commands"


@frozen(kw_only=True)
class TrainCommand(CommandOfModule):
    """Train with a config file."""

    name = "train"
    heading = "Training"
    module = "lorakit.cli.commands"


@frozen(kw_only=True)
class SweepCommand(CommandOfModule):
    """Train with every combination of some values, and compare the results."""

    name = "sweep"
    heading = "Training"
    module = "lorakit.cli.series"


@frozen(kw_only=True)
class GridCommand(CommandOfModule):
    """Draw prompts with several LoRA files at several strengths on one sheet."""

    name = "grid"
    heading = "LoRA files"
    module = "lorakit.cli.grid"


@frozen(kw_only=True)
class LoraCommand(CommandOfModule):
    """Look into LoRA files, merge, resize, convert, average, extract and bake them."""

    name = "lora"
    heading = "LoRA files"
    module = "lorakit.cli.lora"


@frozen(kw_only=True)
class FromKohyaCommand(CommandOfModule):
    """Convert a command line of sd-scripts, or a file of its GUI, to a config file."""

    name = "from-kohya"
    heading = "Other"
    module = "lorakit.cli.commands"


@frozen(kw_only=True)
class PluginsCommand(CommandOfModule):
    """List all components, or the keys of one."""

    name = "plugins"
    heading = "Other"
    module = "lorakit.cli.commands"


@hookimpl
def register_commands() -> list[type[CommandConfig]]:
    """All commands, in the order of work."""
    training = [InitCommand, CheckCommand, PlanCommand, CacheCommand, TrainCommand, SweepCommand]
    return [*training, DataCommand, CaptionCommand, GridCommand, LoraCommand, FromKohyaCommand, PluginsCommand]
