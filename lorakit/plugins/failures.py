"""Errors of plugins: which component and package they come from, in one line, with what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorakit.api.components import Component
from lorakit.errors import LorakitError, PluginError, Problem, is_out_of_memory
from lorakit.plugins.discovery import source_of
from lorakit.plugins.import_hints import import_hint


def format_error(error: BaseException) -> str:
    """An error as the end of a message: with its class, unless it was raised on purpose.

    A failed import from lorakit becomes the import to write instead.
    """
    text = " ".join(str(error).split())
    if isinstance(error, PluginError):
        return text
    hint = import_hint(error) if isinstance(error, ImportError) else ""
    return hint or f"{type(error).__name__}: {text}".removesuffix(": ")


def describe_component(component: Component) -> str:
    """A component by kind, name and the package that provides it: `optimizer 'lion' of lorakit 0.1.0`."""
    module = type(component).__module__
    return f"{component.kind} {component.name!r} of {source_of(module) or module}"


@contextmanager
def plugin_errors(component: Component, doing: str) -> Iterator[None]:
    """Raise PluginError, which names the component and its package, for anything but lorakit's own errors.

    Running out of memory passes through: it is no fault of the plugin.
    """
    try:
        yield
    except LorakitError:
        raise
    except (Exception, SystemExit) as error:  # a plugin can raise anything
        if is_out_of_memory(error):
            raise
        cure = "report it to its authors, with the traceback that --debug shows, or choose another"
        raise PluginError(
            f"{describe_component(component)} failed in {doing}: {format_error(error)}; {cure}"
        ) from error


def collect_problems(component: Component, method: str, *arguments: object) -> list[Problem]:
    """What a component's `problems`, `warnings` or the like yields. Raises PluginError where the method fails."""
    with plugin_errors(component, method):
        found = list(getattr(component, method)(*arguments))
        for problem in found:
            if not isinstance(problem, Problem):
                raise TypeError(f"it yields {problem!r}, not a Problem")
    return found
