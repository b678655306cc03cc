"""What is installed: plugins as packages register them, imported one by one, and what their hooks return, checked."""

from __future__ import annotations

import difflib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any, get_type_hints

import pluggy
from attrs import fields, frozen

from lorakit.api import hookspecs
from lorakit.api.components import (
    AttentionConfig,
    Component,
    LRSchedulerConfig,
    ModelFamilyConfig,
    NetworkConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
)
from lorakit.api.loss import LossConfig
from lorakit.api.sampling import SamplerConfig, TimestepSamplerConfig
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
    "register_losses": LossConfig,
    "register_timestep_samplers": TimestepSamplerConfig,
    "register_samplers": SamplerConfig,
    "register_observers": ObserverConfig,
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

    def is_of(self, distribution: str) -> bool:
        """Whether a distribution's name, however it is spelt, is that of this plugin's."""
        return _normalised(self.distribution) == _normalised(distribution)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


Installed = tuple[PluginSource, Callable[[], object]]
"""A plugin as it is found: where it comes from, and the function that imports it."""


@contextmanager
def named_if_slow(provider: PluginSource) -> Iterator[None]:
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


def installed_plugins() -> Iterator[Installed]:
    """Every plugin of every installed package, by name; none is imported."""
    found: dict[str, list[Installed]] = {}
    for distribution in metadata.distributions():
        if f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or ""):
            name, version = (_metadata_field(distribution, key) for key in ("Name", "Version"))
            # The first on the path is the one that is imported.
            found.setdefault(_normalised(name), _entry_points(distribution, name, version))
    plugins = [plugin for own in found.values() for plugin in own]
    # By name, so that the order of installation changes nothing.
    yield from sorted(plugins, key=lambda plugin: (plugin[0].entry_point, plugin[0]))


def _metadata_field(distribution: metadata.Distribution, key: str) -> str:
    found: list[str] = distribution.metadata.get_all(key) or ["unknown"]
    return found[0]


def _entry_points(distribution: metadata.Distribution, name: str, version: str) -> list[Installed]:
    try:
        return [
            (PluginSource(name, version, found.name), found.load)
            for found in distribution.entry_points.select(group=GROUP)
        ]
    except Exception as error:  # a malformed file makes importlib raise various things
        return [(PluginSource(name, version, "entry_points.txt"), partial(_refuse, f"it cannot be read: {error}"))]


def _refuse(reason: str) -> object:
    raise PluginError(reason)


def load_hooks(plugin: object) -> pluggy.HookRelay:
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


def registered_components(hooks: pluggy.HookRelay) -> Iterator[type[Component]]:
    """The components that a plugin registers. Raises PluginError for what is none, or lacks what each must have."""
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


def _normalised(distribution: str) -> str:
    """A distribution's name as package installers compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def format_error(error: BaseException) -> str:
    """An error for the end of a message: with its class, unless it was raised on purpose."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}".removesuffix(": ")
