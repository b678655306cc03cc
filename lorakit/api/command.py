"""The base class of commands: `lorakit NAME`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from lorakit.api.components import Component

if TYPE_CHECKING:
    import click


@frozen(kw_only=True)
class CommandConfig(Component):
    """A command: `lorakit NAME`. It has no keys; its options are those of the click command that it builds.

    The first line of a subclass's docstring describes it in `lorakit --help`.
    """

    kind = "command"
    product = "a click.Command"
    product_methods = ("make_context", "invoke")

    heading: ClassVar[str] = "Commands of plugins"
    """What it is listed under in `lorakit --help`."""

    def build(self) -> click.Command:
        """The command, or a `click.Group` of commands.

        Called when it is run, so what it needs is imported here. `--debug` is added to it. Errors of `lorakit.errors`
        that it raises are shown without a traceback, and end the process with their exit status.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")
