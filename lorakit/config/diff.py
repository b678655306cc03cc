"""Configs as they are kept beside what depends on them, and what differs from a config later."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from attrs import frozen

from lorakit.api.components import Component
from lorakit.config.dump import to_tables
from lorakit.config.load import COMPONENT_SECTIONS
from lorakit.config.train_config import TrainConfig


@frozen
class Difference:
    """A key that has another value than before."""

    key: str
    """Its path, `training.seed`; of a dataset or subset with its number where there are several."""
    before: Any
    """The earlier value, as in JSON; None where the key was absent."""
    now: Any
    """The value in the config."""


def as_json(config: TrainConfig) -> dict[str, Any]:
    """All sections but the observers as values that JSON has, defaults included, without the keys that are not set."""
    return {section: _plain(table) for section, table in to_tables(config).items() if section != "observers"}


def differences(config: TrainConfig, before: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs from what `as_json` gave; a key that it lacks, as it may be new, had its default."""
    for section, now in as_json(config).items():
        yield from _of_table(section, getattr(config, section), now, before.get(section, {}))


def _of_table(place: str, config: Any, now: Mapping[str, Any], before: Any) -> Iterator[Difference]:
    if not isinstance(before, Mapping):
        yield Difference(place, before, now)
        return
    known = {field.name: field for field in attrs.fields(type(config))}
    another = False
    if isinstance(config, Component):
        key = config.name_key
        named = before.get(key, COMPONENT_SECTIONS.get(place, (None, None))[1])
        another = named != now[key]
        if another:
            yield Difference(f"{place}.{key}", named, now[key])
        before = {name: value for name, value in before.items() if name != key}
    for name, field in known.items():
        # Of another component's keys only those that both have can be compared.
        if name in before or not another:
            own, earlier = now.get(name), before.get(name, _plain(_default(field, config)))
            yield from _of_value(f"{place}.{name}", getattr(config, name), own, earlier)
    for name in before.keys() - known.keys():
        if not another:
            yield Difference(f"{place}.{name}", before[name], None)


def _of_value(place: str, config: Any, now: Any, before: Any) -> Iterator[Difference]:
    tables = isinstance(config, tuple) and config and attrs.has(type(config[0]))
    if not tables or not isinstance(before, list):
        if now != before:
            yield Difference(place, before, now)
    elif len(config) != len(before):
        yield Difference(place, f"{len(before)} tables", f"{len(config)} tables")
    else:
        for number, own in enumerate(config):
            # A single table may be written without one of its own, its keys in that above it.
            own_place = f"{place}[{number}]" if len(config) > 1 else place.rpartition(".")[0]
            yield from _of_table(own_place, own, now[number], before[number])


def _default(field: Any, config: Any) -> Any:
    """The default of a field; None where it has none."""
    if not isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
        return None if field.default is attrs.NOTHING else field.default
    return field.default.factory(config) if field.default.takes_self else field.default.factory()


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))
