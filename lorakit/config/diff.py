"""Configs as saved states keep them, and how a later config differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from attrs import frozen

from lorakit.config.dump import to_tables
from lorakit.config.load import COMPONENT_SECTIONS
from lorakit.config.train_config import TrainConfig
from lorakit.utils.plain import plain


@frozen
class Difference:
    """A key whose value has changed."""

    key: str
    """Its path, `training.seed`; with the number of the dataset or subset if there are several."""
    before: Any
    """The earlier value, as in JSON; None if it was absent."""
    now: Any
    """The value in the config."""


def as_json(config: TrainConfig) -> dict[str, Any]:
    """All sections but the observers as JSON values, defaults included, without the keys that are not set."""
    return {section: table for section, table in to_tables(config).items() if section != "observers"}


def differences(config: TrainConfig, before: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs from what `as_json` gave; a key that it lacks, as it may be new, had its default."""
    earlier = {key: value for section, table in before.items() for key, value in _flat(section, table)}
    now, defaults = dict(_flat("", as_json(config))), dict(_defaults(config))
    names = {
        "model": "model.family",
        **{section: f"{section}.{base.name_key}" for section, (base, _) in COMPONENT_SECTIONS.items()},
    }
    replaced = {section for section, key in names.items() if earlier.get(key, defaults.get(key)) != now[key]}
    tables = {key.removesuffix("[]"): count for key, count in now.items() if key.endswith("[]")}
    resized = [path for path, count in tables.items() if earlier.get(f"{path}[]") != count]
    for key in dict.fromkeys((*defaults, *now, *earlier)):
        section = key.partition(".")[0]
        # Of another component's keys only those that both have can be compared; of another number of tables, none.
        is_foreign = section in replaced and key != names[section] and not (key in defaults and key in earlier)
        is_unpaired = any(key.startswith(f"{path}[") and key != f"{path}[]" for path in resized)
        then, value = earlier.get(key, defaults.get(key)), now.get(key)
        if then == value or is_foreign or is_unpaired:
            continue
        if key.endswith("[]"):
            then, value = f"{then or 0} tables", f"{value or 0} tables"
        # A single table may be left out, its keys written in the one above it.
        for path in sorted(tables, key=len, reverse=True):
            if tables[path] == 1 and key.startswith(f"{path}[0]"):
                key = path.rpartition(".")[0] + key.removeprefix(f"{path}[0]")  # noqa: PLW2901
        yield Difference(key.removesuffix("[]"), then, value)


def _flat(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of a table by their full keys; for a list of tables, `key[]` is how many there are."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{place}.{key}" if place else key, item)
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        yield f"{place}[]", len(value)
        for number, item in enumerate(value):
            yield from _flat(f"{place}[{number}]", item)
    else:
        yield place, value


def _defaults(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """The default of every field of the config's sections by its full key; None where it has none."""
    waiting: list[tuple[str, Any]] = [(section, getattr(config, section)) for section in as_json(config)]
    for place, table in waiting:
        if place in COMPONENT_SECTIONS:
            base, default_name = COMPONENT_SECTIONS[place]
            yield f"{place}.{base.name_key}", default_name
        for field in attrs.fields(type(table)):
            value, default = getattr(table, field.name), field.default
            if isinstance(value, tuple) and value and attrs.has(type(value[0])):
                waiting += [(f"{place}.{field.name}[{number}]", item) for number, item in enumerate(value)]
                continue
            if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
                default = default.factory(table) if default.takes_self else default.factory()
            yield from _flat(f"{place}.{field.name}", None if default is attrs.NOTHING else plain(default))
