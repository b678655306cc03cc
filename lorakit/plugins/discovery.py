"""Installed plugins: found by their entry points, imported one by one, and what their hooks return, checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import metadata
from itertools import chain, takewhile
from typing import Any, get_type_hints

import pluggy
from attrs import fields, frozen

from lorakit import api
from lorakit.api import hookspecs
from lorakit.api.components import Component
from lorakit.errors import PluginError

GROUP = "lorakit"
"""The entry-point group that plugins register in."""

REGISTRATION_HOOKS: Mapping[str, type[Component]] = {
    # Each is specified as `def register_networks() -> list[type[NetworkConfig]]`.
    name: getattr(api, hook.__annotations__["return"].removeprefix("list[type[").removesuffix("]]"))
    for name, hook in vars(hookspecs).items()
    if name.startswith("register_")
}
"""Each registration hook, with the base of the classes that it returns."""


@frozen(order=True)
class PluginSource:
    """Where a plugin comes from."""

    distribution: str
    """The installed package."""
    version: str
    """Its version."""
    entry_point: str
    """The plugin's name in the entry-point group."""
    module: str
    """The module that the entry point names."""

    def is_of(self, distribution: str) -> bool:
        """Whether it comes from the distribution of this name, in any spelling that pip accepts."""
        return _normalised(self.distribution) == _normalised(distribution)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


Installed = tuple[PluginSource, Callable[[], object]]
"""A plugin that is not imported yet: where it comes from, and the function that imports it."""


def installed_plugins() -> Iterator[Installed]:
    """Every plugin of every installed package, sorted by name; none is imported."""
    found: dict[str, list[Installed]] = {}
    for distribution in metadata.distributions():
        if f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or ""):
            name, version = ((distribution.metadata.get_all(key) or ["unknown"])[0] for key in ("Name", "Version"))
            # The first on the path is the one that Python imports.
            found.setdefault(_normalised(name), _entry_points(distribution, name, version))
    # Sorted, so that the order of installation changes nothing.
    yield from sorted(chain(*found.values()), key=lambda plugin: (plugin[0].entry_point, plugin[0]))


def _entry_points(distribution: metadata.Distribution, name: str, version: str) -> list[Installed]:
    try:
        return [
            (PluginSource(name, version, found.name, found.module), found.load)
            for found in distribution.entry_points.select(group=GROUP)
        ]
    except Exception as error:  # a malformed file makes importlib raise various things
        source = PluginSource(name, version, "entry_points.txt", module="")
        return [(source, partial(_raise, PluginError(f"it cannot be read: {error}")))]


def _raise(error: PluginError) -> object:
    raise error


def source_of(module: str) -> PluginSource | None:
    """The plugin that a module belongs to: the one whose entry point's module has the longest start in common."""
    nearest, most = None, 0
    for source, _ in installed_plugins():
        pairs = zip(module.split("."), source.module.split("."), strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common > most:
            nearest, most = source, common
    return nearest


def load_hooks(plugin: object) -> pluggy.HookRelay:
    """The hooks that one plugin implements. Raises PluginError for an unknown hook, wrong arguments or no hook."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    known = [*REGISTRATION_HOOKS, "detect_model_family"]
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec():
            near = difflib.get_close_matches(caller.name, known, n=1, cutoff=0)
            raise PluginError(f"there is no hook {caller.name!r}; did you mean {near[0]!r}?")
    if not callers:
        raise PluginError("it implements no hook; mark its functions with @lorakit.hookimpl")
    return manager.hook


def registered_components(hooks: pluggy.HookRelay) -> Iterator[type[Component]]:
    """The components that a plugin registers. Raises PluginError for anything that is no complete component."""
    for hook_name, base in REGISTRATION_HOOKS.items():
        hook = getattr(hooks, hook_name)
        # pluggy drops results that are None.
        results = (hook() or [None]) if hook.get_hookimpls() else []
        for returned in results:
            if not isinstance(returned, Iterable) or isinstance(returned, str):
                raise PluginError(f"{hook_name} returned {returned!r}, not a list of classes")
            for component in returned:
                _check_component(component, base, hook_name)
                yield component


def _check_component(component: Any, base: type[Component], hook_name: str) -> None:
    if not (isinstance(component, type) and issubclass(component, base)):
        raise PluginError(f"{hook_name} returned {component!r}, which is not a subclass of {base.__name__}")
    class_name = component.__name__
    if "__attrs_attrs__" not in vars(component):
        raise PluginError(f"{class_name} is not an attrs class; put @frozen(kw_only=True) above it")
    name = getattr(component, "name", None)
    if not isinstance(name, str) or not name or ":" in name:
        raise PluginError(f"{class_name} has no name; add a line such as: name = 'example'")
    if component.build is base.build:  # type: ignore[attr-defined]
        raise PluginError(f"{class_name} has no method build, which returns the {base.kind}")
    try:
        types = get_type_hints(component)
    except NameError as error:
        cure = "import it outside of `if TYPE_CHECKING`, because values in config files are checked against it"
        raise PluginError(f"{class_name} has a field whose type is unknown: {error}; {cure}") from error
    untyped = [field.name for field in fields(component) if field.name not in types]
    if untyped:
        raise PluginError(
            f"{class_name} has a field without a type: {untyped[0]}; write such as: {untyped[0]}: int = 1"
        )


def _normalised(distribution: str) -> str:
    """A distribution's name as pip compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
