"""The status of each of sd-scripts' options, from the keys of the installed lorakit."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable
from enum import Enum

import attrs

from lorakit.api.components import Component, ObserverConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.config.datasets import DataSection, DatasetConfig, SubsetConfig
from lorakit.config.load import COMPONENT_SECTIONS, PLAIN_SECTIONS
from lorakit.config.sd_scripts import Option
from lorakit.plugins.catalog import Catalog


class OptionStatus(Enum):
    """Whether an option can be used."""

    WORKS = "works"
    """A key does the same."""
    NOT_NEEDED = "not needed"
    """Nothing has to be done for it."""
    UNSUPPORTED = "later"
    """Nothing does the same."""


NOT_YET = "not available yet"
"""The reason where a row of the table gives no better one."""


def known_keys(catalog: Catalog) -> dict[str, object]:
    """All keys of a config file, `network.rank`, with their defaults.

    For keys that pick a component there is also one entry per name: `network.name = "lierla"`.
    """
    keys: dict[str, object] = {"data.config": attrs.NOTHING}
    keys |= _fields("data", [DataSection, DatasetConfig, SubsetConfig])
    for section, cls in PLAIN_SECTIONS.items():
        keys |= _fields(section, [cls])
    kinds: dict[str, tuple[type[Component], str | None]] = {**COMPONENT_SECTIONS}
    kinds |= {"model": (ModelFamilyConfig, None), "observers": (ObserverConfig, None)}
    for section, (base, default) in kinds.items():
        picks = base.name_key
        # Converted configs have each `name`, even where it is the default.
        keys[f"{section}.{picks}"] = attrs.NOTHING if picks == "name" or default is None else default
        for name, registrations in catalog.of_kind(base).items():
            keys[f'{section}.{picks} = "{name}"'] = attrs.NOTHING
            keys |= _fields(section, [found.component for found in registrations])
    return keys


def _fields(section: str, classes: Iterable[type]) -> dict[str, object]:
    """The keys of a section's classes and their defaults."""
    fields = [field for cls in classes for field in attrs.fields(cls)]
    return {f"{section}.{field.name}": field.default for field in fields if field.init}


def option_status(option: Option, keys: Collection[str]) -> OptionStatus:
    """The status of an option given these keys; keys of plugins count as available."""
    key, _, value = option.key.partition(" = ")
    if option.plugin:
        return OptionStatus.WORKS
    if key and key in keys and (not value or not key.endswith((".name", ".family")) or option.key in keys):
        return OptionStatus.WORKS
    return OptionStatus.NOT_NEEDED if option.unneeded else OptionStatus.UNSUPPORTED


def target_of(option: Option) -> tuple[str, str, object]:
    """Section, key, and the value that a flag gives it; True where the table names none."""
    key, _, value = option.key.partition(" = ")
    section, _, name = key.partition(".")
    return section, name, tomllib.loads(f"value = {value}")["value"] if value else True
