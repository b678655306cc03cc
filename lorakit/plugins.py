"""Discovery of plugins, and the catalog of all that they provide.

Each entry point is loaded and asked on its own, so that a plugin that fails to import, misspells a
hook or raises is noted with its error and takes nothing else down. A name that two distributions
provide belongs to neither: asking for it names both.
"""

from __future__ import annotations

import difflib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any, TypeVar, get_type_hints

import pluggy
from attrs import fields, frozen

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
    named,
)
from lorakit.errors import PluginError

log = logging.getLogger(__name__)

GROUP = "lorakit"
"""The entry-point group that plugins register in."""

PATIENCE = 5.0
"""Seconds after which a plugin is named that is still being imported."""

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

    def is_of(self, distribution: str) -> bool:
        """Whether a distribution's name, however it is spelt, is that of this plugin's."""
        return _normalised(self.distribution) == _normalised(distribution)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


Installed = tuple[Provider, Callable[[], object]]
"""A plugin as it is found: where it comes from, and the function that imports it."""


@frozen
class Registration:
    """A component and where it comes from."""

    component: type[Component]
    provider: Provider


@frozen
class Detector:
    """A function that recognises models of a family, and where it comes from."""

    detect: Callable[..., object]
    """The hook; takes `checkpoint`."""
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
    detectors: tuple[Detector, ...] = ()

    @classmethod
    def discover(cls) -> Catalog:
        """The catalog of what is installed."""
        return cls.of(_installed_plugins())

    @classmethod
    def of(cls, plugins: Iterable[Installed]) -> Catalog:
        """The catalog of given plugins, each with a function that imports it."""
        # A dict, because a module that imports another's hook registers the same component once more.
        registrations: dict[tuple[type[Component], str], Registration] = {}
        broken: list[BrokenPlugin] = []
        detectors: list[Detector] = []
        for provider, load in plugins:
            try:
                with _named_if_slow(provider):
                    hooks = _hooks_of(load())
                    components = list(_components_of(hooks))
            # SystemExit too: an import that calls sys.exit must not end lorakit.
            except (Exception, SystemExit) as error:
                log.debug("plugin %r of %s is broken", provider.entry_point, provider, exc_info=True)
                broken.append(BrokenPlugin(provider, in_one_line(error)))
                continue
            for component in components:
                registrations.setdefault((component, provider.distribution), Registration(component, provider))
            if hooks.detect_model_family.get_hookimpls():
                detectors.append(Detector(hooks.detect_model_family, provider))
        return cls(tuple(registrations.values()), tuple(broken), tuple(detectors))

    def of_kind(self, base: type[Component]) -> dict[str, list[Registration]]:
        """The components derived from `base`, by name; more than one entry is a clash."""
        found: dict[str, list[Registration]] = {}
        for registration in self.registrations:
            if issubclass(registration.component, base):
                found.setdefault(registration.component.name, []).append(registration)
        return dict(sorted(found.items()))

    def find(self, base: type[ComponentT], name: str) -> type[ComponentT]:
        """The component of a kind by its name, or by `distribution:name` where two share the name.

        A dotted path that is nobody's name is one to a class, for the component that is `by_path`.
        Raises PluginError, which says what is near, what clashes, or which broken plugin may have provided it.
        """
        distribution, _, short_name = name.rpartition(":")
        known = self.of_kind(base).get(short_name) or (self._by_path(base) if "." in short_name else [])
        candidates = [found for found in known if not distribution or found.provider.is_of(distribution)]
        if not candidates:
            raise PluginError(self._unknown(base, name))
        if len(candidates) > 1:
            raise PluginError(_clash(base, short_name, candidates))
        component: type[ComponentT] = named(candidates[0].component, short_name)  # type: ignore[arg-type]
        missing = missing_packages(component)
        if missing:
            what = "a package that is" if len(missing) == 1 else "packages that are"
            raise PluginError(f"{base.kind} {name!r} needs {what} not installed: pip install {' '.join(missing)}")
        return component

    def _by_path(self, base: type[Component]) -> list[Registration]:
        own = [found for found in self.registrations if issubclass(found.component, base)]
        return [found for found in own if found.component.by_path]

    def full_name(self, component: type[Component]) -> str:
        """What to write in a config for a component: its name, with the distribution where two share the name."""
        same = [found for found in self.registrations if _kind_and_name(found.component) == _kind_and_name(component)]
        own = next((found.provider for found in same if found.component is component), None)
        return f"{own.distribution}:{component.name}" if own and len(same) > 1 else component.name

    def detect_model_family(self, checkpoint: CheckpointSummary) -> str | None:
        """The family that a checkpoint belongs to, as the first plugin says that knows it.

        A plugin that fails at it is passed over with a warning.
        """
        for detector in self.detectors:
            try:
                found = detector.detect(checkpoint=checkpoint)
                if not isinstance(found, str | None):
                    raise TypeError(f"detect_model_family returned {found!r}, not the name of a family")
            except (Exception, SystemExit) as error:  # a plugin can raise anything
                plugin = detector.provider
                log.warning(
                    "the plugin %r of %s cannot tell the family of %s: %s",
                    plugin.entry_point, plugin, checkpoint.path, in_one_line(error),
                    exc_info=log.isEnabledFor(logging.DEBUG),
                )  # fmt: skip
            else:
                if found is not None:
                    return found
        return None

    def _unknown(self, base: type[Component], name: str) -> str:
        known = self.of_kind(base)
        short_name = name.rpartition(":")[2]
        near = difflib.get_close_matches(short_name.lower(), known, n=1, cutoff=0.6)
        hint = f"there are {', '.join(known)}" if known else "there is none"
        if near:
            hint = f"did you mean {near[0]!r}?"
        if short_name in known:
            hint = f"{short_name!r} is provided by {_listed(known[short_name])}"
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


@contextmanager
def _named_if_slow(provider: Provider) -> Iterator[None]:
    """Say which plugin is being imported when that takes long, as an import cannot be ended from outside."""
    text = "the plugin %r of %s is still being imported after %g seconds; Ctrl-C stops lorakit"
    timer = threading.Timer(PATIENCE, log.warning, (text, provider.entry_point, provider, PATIENCE))
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        text = "stopped while the plugin %r of %s was being imported; if it never ends: pip uninstall %s"
        log.warning(text, provider.entry_point, provider, provider.distribution)
        raise
    finally:
        timer.cancel()


def _installed_plugins() -> Iterator[Installed]:
    found: dict[str, list[Installed]] = {}
    for distribution in metadata.distributions():
        if f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or ""):
            name, version = (_stated(distribution, key) for key in ("Name", "Version"))
            # The first on the path is the one that is imported.
            found.setdefault(_normalised(name), _entry_points(distribution, name, version))
    plugins = [plugin for own in found.values() for plugin in own]
    # By name, so that the order of installation changes nothing.
    yield from sorted(plugins, key=lambda plugin: (plugin[0].entry_point, plugin[0]))


def _stated(distribution: metadata.Distribution, key: str) -> str:
    found: list[str] = distribution.metadata.get_all(key) or ["unknown"]
    return found[0]


def _entry_points(distribution: metadata.Distribution, name: str, version: str) -> list[Installed]:
    try:
        return [
            (Provider(name, version, found.name), found.load) for found in distribution.entry_points.select(group=GROUP)
        ]
    except Exception as error:  # a malformed file makes importlib raise various things
        return [(Provider(name, version, "entry_points.txt"), partial(_refuse, f"it cannot be read: {error}"))]


def _refuse(reason: str) -> object:
    raise PluginError(reason)


def _hooks_of(plugin: object) -> pluggy.HookRelay:
    """The hooks that one plugin implements; raises for a misspelt hook, wrong arguments or no hook at all."""
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


def _components_of(hooks: pluggy.HookRelay) -> Iterator[type[Component]]:
    for hook_name, base in REGISTRATION_HOOKS.items():
        hook = getattr(hooks, hook_name)
        # pluggy leaves out what returns None.
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
        raise PluginError(f"{class_name} has no method build, which makes the {base.kind}")
    try:
        types = get_type_hints(component)
    except NameError as error:
        cure = "import it outside of `if TYPE_CHECKING`, because config files are checked by it"
        raise PluginError(f"{class_name} has a field whose type is unknown: {error}; {cure}") from error
    untyped = [own.name for own in fields(component) if own.name not in types]
    if untyped:
        raise PluginError(
            f"{class_name} has a field without a type: {untyped[0]}; write such as: {untyped[0]}: int = 1"
        )


def _clash(base: type[Component], name: str, candidates: Sequence[Registration]) -> str:
    names = sorted({candidate.provider.distribution for candidate in candidates})
    text = f"{base.kind} {name!r} is provided by {_listed(candidates)}"
    if len(names) == 1:
        return f"{text}; one distribution cannot provide it twice, so tell its authors, or uninstall it"
    qualified = " or ".join(f"'{distribution}:{name}'" for distribution in names)
    return f"{text}; write {qualified}, or uninstall one of them"


def _listed(registrations: Sequence[Registration]) -> str:
    providers = [registration.provider for registration in registrations]
    return " and ".join(f"{provider} ({provider.entry_point})" for provider in providers)


def _kind_and_name(component: type[Component]) -> tuple[str, str]:
    return component.kind, component.name


def _normalised(distribution: str) -> str:
    """A distribution's name as package installers compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def in_one_line(error: BaseException) -> str:
    """An error for the end of a message: with its class, unless it was raised on purpose."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}".removesuffix(": ")
