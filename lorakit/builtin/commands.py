"""The commands that come with lorakit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api import CommandConfig, hookimpl

if TYPE_CHECKING:
    import click


@frozen(kw_only=True)
class InitCommand(CommandConfig):
    """Write a commented config file to start from."""

    name = "init"
    heading = "Training"

    def build(self) -> click.Command:
        """`lorakit init`."""
        from lorakit.cli.commands import init

        return init


@frozen(kw_only=True)
class CheckCommand(CommandConfig):
    """Validate a config file and list every problem at once."""

    name = "check"
    heading = "Training"

    def build(self) -> click.Command:
        """`lorakit check`."""
        from lorakit.cli.commands import check

        return check


@frozen(kw_only=True)
class DataCommand(CommandConfig):
    """Report on images and captions, and draw them as they are trained."""

    name = "data"
    heading = "Data"

    def build(self) -> click.Command:
        """`lorakit data`."""
        from lorakit.cli.data import data

        return data


@frozen(kw_only=True)
class CaptionCommand(CommandConfig):
    """Write captions of images, or edit them."""

    name = "caption"
    heading = "Data"

    def build(self) -> click.Command:
        """`lorakit caption`."""
        from lorakit.cli.caption import caption

        return caption


@frozen(kw_only=True)
class PlanCommand(CommandConfig):
    """Estimate steps, memory and time of a run."""

    name = "plan"
    heading = "Training"

    def build(self) -> click.Command:
        """`lorakit plan`."""
        from lorakit.cli.commands import plan

        return plan


@frozen(kw_only=True)
class CacheCommand(CommandConfig):
    """Encode images and captions into the cache."""

    name = "cache"
    heading = "Training"

    def build(self) -> click.Command:
        """`lorakit cache`."""
        from lorakit.cli.commands import cache

        return cache


@frozen(kw_only=True)
class TrainCommand(CommandConfig):
    """Train with a config file."""

    name = "train"
    heading = "Training"

    def build(self) -> click.Command:
        """`lorakit train`."""
        from lorakit.cli.commands import train

        return train


@frozen(kw_only=True)
class SweepCommand(CommandConfig):
    """Train with every combination of some values, and compare the results."""

    name = "sweep"
    heading = "Training"

    def build(self) -> click.Command:
        """`lorakit sweep`."""
        from lorakit.cli.series import sweep

        return sweep


@frozen(kw_only=True)
class GridCommand(CommandConfig):
    """Draw prompts with several LoRA files at several strengths on one sheet."""

    name = "grid"
    heading = "LoRA files"

    def build(self) -> click.Command:
        """`lorakit grid`."""
        from lorakit.cli.grid import grid

        return grid


@frozen(kw_only=True)
class LoraCommand(CommandConfig):
    """Look into LoRA files, merge, resize, convert, average, extract and bake them."""

    name = "lora"
    heading = "LoRA files"

    def build(self) -> click.Command:
        """`lorakit lora`."""
        from lorakit.cli.lora import lora

        return lora


@frozen(kw_only=True)
class FromKohyaCommand(CommandConfig):
    """Convert a command line of sd-scripts, or a file of its GUI, to a config file."""

    name = "from-kohya"
    heading = "Other"

    def build(self) -> click.Command:
        """`lorakit from-kohya`."""
        from lorakit.cli.commands import from_kohya

        return from_kohya


@frozen(kw_only=True)
class PluginsCommand(CommandConfig):
    """List all components, or the keys of one."""

    name = "plugins"
    heading = "Other"

    def build(self) -> click.Command:
        """`lorakit plugins`."""
        from lorakit.cli.commands import plugins

        return plugins


@hookimpl
def register_commands() -> list[type[CommandConfig]]:
    """All commands, in the order of work."""
    training = [InitCommand, CheckCommand, PlanCommand, CacheCommand, TrainCommand, SweepCommand]
    return [*training, DataCommand, CaptionCommand, GridCommand, LoraCommand, FromKohyaCommand, PluginsCommand]
