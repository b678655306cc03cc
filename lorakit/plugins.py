"""Discovery of plugins, and the catalog of all that they provide.

Each entry point is loaded and asked on its own, so that a plugin that fails to import, misspells a
hook or raises is noted with its error and takes nothing else down. A name that two distributions
provide belongs to neither: asking for it names both.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any, TypeVar

import attrs
import pluggy
from attrs import frozen

from lorakit import hookspecs
from lorakit.checkpoints import CheckpointSummary
from lorakit.components import (
    AttentionConfig,
    Component,
    LRSchedulerConfig,
    ModelFamilyConfig,
    NetworkConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
)
from lorakit.errors import PluginError

GROUP = "lorakit"
"""The entry-point group that plugins register in."""

REGISTRATION_HOOKS: Mapping[str, type[Component]] = {
    "register_model_families": ModelFamilyConfig,
    "register_networks": NetworkConfig,
    "register_optimizers": OptimizerConfig,
    "register_lr_schedulers": LRSchedulerConfig,
    "register_attention_backends": AttentionConfig,
    "register_savers": SaverConfig,
    "register_observers": ObserverConfig,
}
"""Each registration hook, with the base of the classes that it returns."""

ComponentT = TypeVar("ComponentT", bound=Component)


@frozen(order=True)
class Provider:
    """Where a plugin comes from."""

    distribution: str
    """The installed package."""
    version: str
    """Its version."""
    entry_point: str
    """The plugin's name in the entry-point group."""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@frozen
class Registration:
    """A component and where it comes from."""

    component: type[Component]
    provider: Provider


@frozen
class BrokenPlugin:
    """A plugin that could not be used, and why."""

    provider: Provider
    error: str


@frozen
class Catalog:
    """All components that installed plugins provide, and the plugins that failed."""

    registrations: tuple[Registration, ...] = ()
    broken: tuple[BrokenPlugin, ...] = ()
    detectors: tuple[Callable[[CheckpointSummary], str | None], ...] = ()

    @classmethod
    def discover(cls) -> Catalog:
        """The catalog of what is installed."""
        return cls.of(_installed_plugins())

    @classmethod
    def of(cls, plugins: Iterable[tuple[Provider, Callable[[], object]]]) -> Catalog:
        """The catalog of given plugins, each with a function that imports it."""
        registrations: list[Registration] = []
        broken: list[BrokenPlugin] = []
        detectors: list[Callable[[CheckpointSummary], str | None]] = []
        for provider, load in plugins:
            try:
                hooks = _hooks_of(load())
                components = list(_components_of(hooks))
            # SystemExit too: an import that calls sys.exit must not end lorakit.
            except (Exception, SystemExit) as error:
                broken.append(BrokenPlugin(provider, f"{type(error).__name__}: {error}"))
                continue
            registrations += [Registration(component, provider) for component in components]
            if hooks.detect_model_family.get_hookimpls():
                detectors.append(_detector(hooks))
        return cls(tuple(registrations), tuple(broken), tuple(detectors))

    def of_kind(self, base: type[ComponentT]) -> dict[str, list[Registration]]:
        """The components derived from `base`, by name; more than one entry is a clash."""
        found: dict[str, list[Registration]] = {}
        for registration in self.registrations:
            if issubclass(registration.component, base):
                found.setdefault(registration.component.name, []).append(registration)
        return dict(sorted(found.items()))

    def find(self, base: type[ComponentT], name: str) -> type[ComponentT]:
        """The component of a kind by its name, or by `distribution:name` where two share the name.

        Raises PluginError, which says what is near, what clashes, or which broken plugin may have provided it.
        """
        distribution, _, short_name = name.rpartition(":")
        known = self.of_kind(base)
        candidates = [
            registration
            for registration in known.get(short_name, [])
            if not distribution or registration.provider.distribution == distribution
        ]
        if not candidates:
            raise PluginError(self._unknown(base, name, known))
        if len(candidates) > 1:
            raise PluginError(_clash(base, name, candidates))
        component = candidates[0].component
        missing = missing_packages(component)
        if missing:
            packages = " ".join(missing)
            raise PluginError(f"{base.kind} {name!r} needs a package that is not installed: pip install {packages}")
        return component  # type: ignore[return-value]

    def detect_model_family(self, checkpoint: CheckpointSummary) -> str | None:
        """The family that a checkpoint belongs to, as the first plugin says that knows it."""
        return next((name for detect in self.detectors if (name := detect(checkpoint))), None)

    def _unknown(self, base: type[Component], name: str, known: Mapping[str, Any]) -> str:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
        text = f"no {base.kind} is called {name!r} ({hint})"
        for plugin in self.broken:
            text += (
                f"; the plugin {plugin.provider.entry_point!r} of {plugin.provider}, "
                f"which may provide it, is broken: {plugin.error}"
            )
        return text


def missing_packages(component: type[Component]) -> list[str]:
    """Those of the optional packages that a component needs which are not installed."""
    missing = []
    for package in component.requires:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    return missing


def _installed_plugins() -> Iterator[tuple[Provider, Callable[[], object]]]:
    seen: set[Provider] = set()
    for entry_point in sorted(metadata.entry_points(group=GROUP), key=lambda found: found.name):
        distribution = entry_point.dist
        name, version = (distribution.name, distribution.version) if distribution else ("unknown", "")
        provider = Provider(name, version, entry_point.name)
        # The same distribution can be on sys.path twice: installed and as a source tree.
        if provider not in seen:
            seen.add(provider)
            yield provider, entry_point.load


def _hooks_of(plugin: object) -> pluggy.HookRelay:
    """The hooks that one plugin implements; raises for a misspelt hook or wrong arguments."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    known = [*REGISTRATION_HOOKS, "detect_model_family"]
    for caller in manager.get_hookcallers(plugin) or []:
        if not caller.has_spec():
            near = difflib.get_close_matches(caller.name, known, n=1, cutoff=0)
            raise PluginError(f"there is no hook {caller.name!r}; did you mean {near[0]!r}?")
    return manager.hook


def _components_of(hooks: pluggy.HookRelay) -> Iterator[type[Component]]:
    for hook_name, base in REGISTRATION_HOOKS.items():
        for returned in getattr(hooks, hook_name)():
            for component in returned:
                _check_component(component, base, hook_name)
                yield component


def _check_component(component: Any, base: type[Component], hook_name: str) -> None:
    if not (isinstance(component, type) and issubclass(component, base)):
        raise PluginError(f"{hook_name} returned {component!r}, which is not a subclass of {base.__name__}")
    if not attrs.has(component) or "__attrs_attrs__" not in vars(component):
        raise PluginError(f"{component.__name__} is not an attrs class; put @frozen(kw_only=True) above it")
    if not isinstance(getattr(component, "name", None), str):
        raise PluginError(f"{component.__name__} has no name; add a line such as: name = 'example'")


def _detector(hooks: pluggy.HookRelay) -> Callable[[CheckpointSummary], str | None]:
    def detect(checkpoint: CheckpointSummary) -> str | None:
        found: str | None = hooks.detect_model_family(checkpoint=checkpoint)
        return found

    return detect


def _clash(base: type[Component], name: str, candidates: list[Registration]) -> str:
    both = " and ".join(str(candidate.provider) for candidate in candidates)
    qualified = " or ".join(f"'{candidate.provider.distribution}:{name}'" for candidate in candidates)
    return f"{base.kind} {name!r} is provided by {both}; write {qualified}, or uninstall one of them"
