"""Errors of components, attributed to the component and its package, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorakit.api.components import Component
from lorakit.errors import LorakitError, PluginError, Problem, is_out_of_memory
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.discovery import PluginSource, format_error


def describe_component(component: Component) -> str:
    """A component by kind, name and the package that provides it, for messages."""
    providers: dict[type, PluginSource] = {
        found.component: found.provider for found in Catalog.discover().registrations
    }
    # The nearest, because a component may be derived from another package's, or stand for a class by its path.
    nearest = (providers[cls] for cls in type(component).__mro__ if cls in providers)
    return f"{component.kind} {component.name!r} of {next(nearest, type(component).__module__)}"


@contextmanager
def plugin_errors(component: Component, doing: str) -> Iterator[None]:
    """Say whose fault it is if a component raises what is no error of lorakit's, as none should.

    Raises PluginError, which names the component and its package. Memory that is not enough is nobody's fault.
    """
    try:
        yield
    except LorakitError:
        raise
    except (Exception, SystemExit) as error:  # a plugin can raise anything
        if is_out_of_memory(error):
            raise
        cure = "tell its authors, who see with --debug where it came from, or choose another"
        raise PluginError(
            f"{describe_component(component)} failed in {doing}: {format_error(error)}; {cure}"
        ) from error


def collect_problems(component: Component, method: str, *arguments: object) -> list[Problem]:
    """What a component's `problems`, `warnings` and the like say. Raises PluginError where one fails."""
    with plugin_errors(component, method):
        told = list(getattr(component, method)(*arguments))
        for problem in told:
            if not isinstance(problem, Problem):
                raise TypeError(f"it gives {problem!r}, not a Problem")
    return told
