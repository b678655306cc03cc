"""What there is to choose from, in lines for a terminal: all components, or the keys of one."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

import attrs
from attrs import frozen

from lorakit.api.components import Component
from lorakit.config.field_docs import field_docs, type_in_words
from lorakit.config.load import COMPONENT_SECTIONS
from lorakit.errors import PluginError
from lorakit.plugins.catalog import Catalog, Registration, missing_packages
from lorakit.plugins.discovery import REGISTRATION_HOOKS
from lorakit.plugins.other_names import meaning_of, none_installed
from lorakit.utils.wording import WIDTH

_KEYS: Mapping[str, str] = {
    base.kind: f'[{section}] with {base.name_key} = "…"' for section, (base, _) in COMPONENT_SECTIONS.items()
} | {
    "model family": "[model], detected automatically",
    "observer": '[[observers]] with name = "…"',
    "sampler": '[[observers]] with name = "samples" and sampler = "…"',
    "command": "lorakit NAME",
    "preset": "lorakit init --for NAME",
    "captioner": "lorakit caption FOLDER --with NAME",
    "dataset source": '[data], or a subset, with source = "…"',
}


@frozen
class Line:
    """A line of output."""

    text: str
    is_title: bool = False
    is_broken: bool = False


def listing(catalog: Catalog, kind: str | None = None) -> Iterator[Line]:
    """Every component with what it is, kind by kind, and the broken plugins; or those of one kind."""
    kinds = [base for base in REGISTRATION_HOOKS.values() if kind in (None, base.kind)]
    names = [name for base in kinds for name in catalog.of_kind(base)]
    broken = [] if kind else [plugin.provider.entry_point for plugin in catalog.broken]
    width = max(map(len, [*names, *broken]), default=0)
    for base in kinds:
        yield Line(f"{base.kind}: {_KEYS.get(base.kind, '')}".rstrip(": "), is_title=True)
        if not catalog.of_kind(base):
            yield Line(f"  {none_installed(base.kind)}")
        for name, registrations in catalog.of_kind(base).items():
            for found in registrations:
                yield from _row(name, found, len(registrations) > 1, width)
    if broken:
        yield Line("broken plugin", is_title=True)
    for plugin in catalog.broken if broken else ():
        text = f"  {plugin.provider.entry_point:<{width}}  {plugin.provider}: {plugin.error}"
        yield Line(text, is_broken=True)


def _row(name: str, found: Registration, clashes: bool, width: int) -> Iterator[Line]:
    """A component: what it is, its package if that is not lorakit, and what keeps it from being used."""
    notes = [] if found.provider.is_of("lorakit") and not clashes else [str(found.provider)]
    if clashes:
        notes.append(f"name clash: write {found.provider.distribution}:{name}")
    if missing := missing_packages(found.component):
        notes.append(f"needs: pip install {' '.join(missing)}")
    text = f"{_summary(found.component)} ({'; '.join(notes)})" if notes else _summary(found.component)
    first, behind = f"  {name:<{width}}  ", " " * (width + 4)
    return map(Line, textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=behind, break_on_hyphens=False))


def _summary(component: type[Component]) -> str:
    """The first line of a docstring, without the source that it cites."""
    first = (inspect.getdoc(component) or "").split("\n")[0]
    return re.sub(r"\s*\([^()]*(\d{4}|arXiv)[^()]*\)", "", first).rstrip(".")


def details(catalog: Catalog, name: str) -> Iterator[Line]:
    """The keys of each component of a name, with type, default and help; for the name of a kind, its components.

    Raises PluginError where there is none.
    """
    if any(name == base.kind for base in REGISTRATION_HOOKS.values()):
        return listing(catalog, name)
    short_name = name.rpartition(":")[2]
    found = [
        registration
        for base in REGISTRATION_HOOKS.values()
        for registration in catalog.of_kind(base).get(short_name, [])
        if ":" not in name or registration.provider.is_of(name.rpartition(":")[0])
    ]
    if not found:
        raise PluginError(f"there is no component called {name!r}{_meant(catalog, name)}")
    return (line for registration in found for line in _component(registration))


def _meant(catalog: Catalog, name: str) -> str:
    known = [own for base in REGISTRATION_HOOKS.values() for own in catalog.of_kind(base)]
    meanings = [meaning_of(base.kind, name, known) for base in REGISTRATION_HOOKS.values()]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    hint = next(filter(None, meanings), f"did you mean {near[0]!r}?" if near else "")
    return f" ({hint})" if hint else "; `lorakit plugins` lists all"


def _component(found: Registration) -> Iterator[Line]:
    component = found.component
    yield Line(f"{component.kind} {component.name}, of {found.provider}", is_title=True)
    for paragraph in (inspect.getdoc(component) or "").split("\n\n"):
        yield from map(Line, textwrap.wrap(paragraph, WIDTH))
    if missing := missing_packages(component):
        yield Line(f"It needs: pip install {' '.join(missing)}")
    yield Line("")
    types, docs = get_type_hints(component), field_docs(component)  # type: ignore[arg-type]
    for own in attrs.fields(component):
        yield Line(f"{own.name} = {_default(own)}   # {type_in_words(types[own.name], own.validator).replace('`', '')}")
        yield from map(
            Line, textwrap.wrap(docs.get(own.name, ""), WIDTH, initial_indent="    ", subsequent_indent="    ")
        )
    yield Line("")


def _default(own: attrs.Attribute[Any]) -> str:
    """The default as a config has it; dots where the key must be given or is absent otherwise."""
    import tomlkit

    value: Any = own.default
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        value = None if value.takes_self else value.factory()
    if value is attrs.NOTHING:
        return "(required)"
    if value is None:
        return "(absent)"
    if value == {}:
        return "{}"  # an empty table's own text is empty
    return str(tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string())
