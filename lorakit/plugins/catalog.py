"""The catalog of all components that installed plugins provide.

Each entry point is loaded separately, so a plugin that fails to import, misspells a hook or raises is
listed with its error and breaks nothing else. A name that two distributions provide is ambiguous:
looking it up is an error that names both.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import TypeVar

from attrs import frozen

from lorakit.api.components import Component, with_import_path
from lorakit.api.model_family import DetectedFamily
from lorakit.checkpoints import CheckpointSummary, kind_of
from lorakit.errors import PluginError
from lorakit.plugins.discovery import Installed, PluginSource, installed_plugins, load_hooks, registered_components
from lorakit.plugins.failures import format_error
from lorakit.plugins.other_names import meaning_of, none_installed

log = logging.getLogger(__name__)

ComponentT = TypeVar("ComponentT", bound=Component)


@frozen
class Registration:
    """A component and where it comes from."""

    component: type[Component]
    provider: PluginSource


@frozen
class Detector:
    """A plugin's function that recognises models of a family."""

    detect: Callable[..., object]
    """The hook `detect_model_family`; its keyword argument is `checkpoint`."""
    provider: PluginSource


@frozen
class BrokenPlugin:
    """A plugin that cannot be used, and why."""

    provider: PluginSource
    error: str


@frozen
class Catalog:
    """All components that installed plugins provide, and the plugins that failed."""

    registrations: tuple[Registration, ...] = ()
    broken: tuple[BrokenPlugin, ...] = ()
    detectors: tuple[Detector, ...] = ()

    @classmethod
    def discover(cls) -> Catalog:
        """The catalog of all installed plugins."""
        return cls.of(installed_plugins())

    @classmethod
    def of(cls, plugins: Iterable[Installed]) -> Catalog:
        """The catalog of these plugins."""
        # A dict, because a module that imports another's hook registers the same component again.
        registrations: dict[tuple[type[Component], str], Registration] = {}
        broken: list[BrokenPlugin] = []
        detectors: list[Detector] = []
        for provider, load in plugins:
            try:
                hooks = load_hooks(load())
                components = list(registered_components(hooks))
            # SystemExit too: a plugin that calls sys.exit while it is imported must not end lorakit.
            except (Exception, SystemExit) as error:
                log.debug("plugin %r of %s is broken", provider.entry_point, provider, exc_info=True)
                broken.append(BrokenPlugin(provider, format_error(error)))
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
        """The component of a kind by its name, or by `distribution:name` if two distributions share the name.

        A dotted name that no component has is an import path, for the component with `takes_import_path`.
        Raises PluginError, which names the nearest match, the clash, or the broken plugins that may provide it.
        """
        distribution, _, short_name = name.rpartition(":")
        of_kind = self.of_kind(base)
        by_path = [found for same in of_kind.values() for found in same if found.component.takes_import_path]
        known = of_kind.get(short_name) or (by_path if "." in short_name else [])
        candidates = [found for found in known if not distribution or found.provider.is_of(distribution)]
        if not candidates:
            raise PluginError(self._unknown(base, name))
        if len(candidates) > 1:
            raise PluginError(_clash(base, short_name, candidates))
        component: type[ComponentT] = with_import_path(candidates[0].component, short_name)  # type: ignore[arg-type]
        missing = missing_packages(component)
        if missing:
            what = "a package that is" if len(missing) == 1 else "packages that are"
            raise PluginError(f"{base.kind} {name!r} needs {what} not installed: pip install {' '.join(missing)}")
        return component

    def full_name(self, component: type[Component]) -> str:
        """A component's name in configs, with the distribution if two distributions share the name."""
        key = component.kind, component.name
        same = [found for found in self.registrations if (found.component.kind, found.component.name) == key]
        source = next((found.provider for found in same if found.component is component), None)
        return f"{source.distribution}:{component.name}" if source and len(same) > 1 else component.name

    def detect_model_family(self, checkpoint: CheckpointSummary) -> DetectedFamily:
        """What a checkpoint is: of the family that the first plugin names, or only with a title, if none does.

        A plugin that fails at it is skipped with a warning.
        """
        titles: list[DetectedFamily] = []
        for detector in self.detectors:
            try:
                found = detector.detect(checkpoint=checkpoint)
                if not isinstance(found, DetectedFamily | None):
                    raise TypeError(f"detect_model_family returned {found!r}, not a DetectedFamily")
            except (Exception, SystemExit) as error:  # a plugin can raise anything
                plugin = detector.provider
                log.warning(
                    "the plugin %r of %s cannot tell the family of %s: %s",
                    plugin.entry_point, plugin, checkpoint.path, format_error(error),
                    exc_info=log.isEnabledFor(logging.DEBUG),
                )  # fmt: skip
            else:
                if found is not None and found.name is not None:
                    return found
                titles += [found] if found else []
        return titles[0] if titles else kind_of(checkpoint)

    def _unknown(self, base: type[Component], name: str) -> str:
        known = self.of_kind(base)
        short_name = name.rpartition(":")[2]
        near = difflib.get_close_matches(short_name.lower(), known, n=1, cutoff=0.6)
        if short_name in known:
            hint = f"{short_name!r} is provided by {_listed(known[short_name])}"
        elif not (hint := meaning_of(base.kind, short_name, known)):
            there_are = f"there are {', '.join(known)}" if known else none_installed(base.kind)
            hint = f"did you mean {near[0]!r}?" if near else there_are
        text = f"no {base.kind} is called {name!r} ({hint})"
        for plugin in self.broken:
            text += (
                f"; the plugin {plugin.provider.entry_point!r} of {plugin.provider}, "
                f"which may provide it, is broken: {plugin.error}"
            )
        return text


def missing_packages(component: type[Component]) -> list[str]:
    """The packages that a component requires and that are not installed."""
    missing = []
    for package in component.requires:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    return missing


def _clash(base: type[Component], name: str, candidates: Sequence[Registration]) -> str:
    names = sorted({candidate.provider.distribution for candidate in candidates})
    text = f"{base.kind} {name!r} is provided by {_listed(candidates)}"
    if len(names) == 1:
        return f"{text}; one distribution cannot provide it twice: report it to its authors, or uninstall it"
    qualified = " or ".join(f"'{distribution}:{name}'" for distribution in names)
    return f"{text}; write {qualified}, or uninstall one of them"


def _listed(registrations: Sequence[Registration]) -> str:
    providers = [registration.provider for registration in registrations]
    return " and ".join(f"{provider} ({provider.entry_point})" for provider in providers)
