"""From a TOML table to a frozen config class, collecting every problem on the way."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import attrs

from lorakit.api.components import Component
from lorakit.config.field_docs import COMPARISONS, field_docs
from lorakit.config.sd_scripts import OTHER_KEYS
from lorakit.config.values import toml_repr, value_converter
from lorakit.errors import PluginError, Problem
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.failures import collect_problems

ConfigT = TypeVar("ConfigT")
ComponentT = TypeVar("ComponentT", bound=Component)


def hint_for(section: str, name: str, known: Collection[str], places: Mapping[str, str]) -> str:
    """A hint for an unknown key of a section: a similar key, or the equivalent of a name in sd-scripts.

    `known` are the keys of the section; `places` gives the full keys of options elsewhere by their bare names.
    Of a key that other components of the section have, such as `betas`, the nearest key here may be meant: `beta1`.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    # As other tools write it: --max-epochs, maxEpochs, MAX_EPOCHS.
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.lstrip("-")).replace("-", "_").lower()
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    prefix = f"{section}." if section else ""
    if name in known:
        return f"did you mean {prefix}{name}?"
    if name in OTHER_KEYS:
        return f"did you mean {OTHER_KEYS[name]}?"
    if places.get(name, "").startswith(f"{section}.{name} of "):
        meant = f"did you mean {section}.{close[0]}? " if close else ""
        return f"{meant}{name} is a key{places[name].removeprefix(f'{section}.{name}')}"
    if name in places or near:
        return f"did you mean {places.get(name) or prefix + near[0]}?"
    return f"known here: {', '.join(known)}" if known else ""


def field_names(cls: type) -> list[str]:
    """The keys of the table that a config class is read from."""
    return [field.name for field in attrs.fields(cls) if field.init]


class TableReader:
    """Structures the tables of one config file and remembers all that is wrong with them."""

    def __init__(
        self, base: Path, file: str = "", places: Mapping[str, str] | None = None, catalog: Catalog | None = None
    ) -> None:
        """`base` is what relative paths are relative to; `file` is put in front of keys in messages.

        `places` gives the full key of options by their bare names, for hints; `catalog` has the components.
        """
        self.problems: list[Problem] = []
        self.base = base
        self.places = places or {}
        self.file = file
        self.catalog = catalog or Catalog()
        self._converter = value_converter(base)

    def report(self, key: str, message: str, hint: str = "") -> None:
        """Note one problem."""
        place = f"{self.file}: {key}" if self.file else key
        self.problems.append(Problem(place, message, hint))

    def table(self, tables: Mapping[str, Any], key: str) -> dict[str, Any]:
        """A sub-table by its key, empty where it is absent or not a table (which is noted)."""
        found = tables.get(key, {})
        if isinstance(found, Mapping):
            return dict(found)
        self.report(key, f"must be a table, [{key}], not {toml_repr(found)}")
        return {}

    def component(self, base: type[ComponentT], name: object, key: str) -> type[ComponentT] | None:
        """The component of a kind by its name, or None if there is none (which is noted)."""
        if not isinstance(name, str):
            problem = "is missing" if name is None else f"must be a text in quotes, not {toml_repr(name)}"
            self.report(key, problem, f"one of {', '.join(self.catalog.of_kind(base))}")
            return None
        try:
            return self.catalog.find(base, name)
        except PluginError as error:
            self.report(key, str(error))
            return None

    def path(self, value: object, key: str) -> Path | None:
        """The value as a path, or None if it is not one (which is reported)."""
        try:
            return self._converter.structure(value, Path)
        except ValueError as error:
            self.report(key, str(error))
            return None

    def report_unknown_keys(self, table: Iterable[str], known: Collection[str], section: str, free: str = "") -> None:
        """Note each key of the table that is not known; `free` is a key of the section that is a table of any keys."""
        for name in table:
            if name not in known:
                hint = hint_for(section, name, known, self.places)
                if free and not difflib.get_close_matches(name, known, n=1):
                    hint = f"did you mean {section}.{free}.{name}?"
                self.report(_join(section, name), "is not a known key", hint)

    def structure(
        self, cls: type[ConfigT], table: Mapping[str, Any], section: str, paths: Mapping[str, str] | None = None
    ) -> ConfigT | None:
        """An instance of `cls` from a table, or None where the table does not give one.

        `paths` gives the full key of a field that was written elsewhere than in this section.
        """
        types = get_type_hints(cls)
        free = next((name for name in field_names(cls) if get_origin(types[name]) is Mapping), "")
        self.report_unknown_keys(table, field_names(cls), section, free)
        values = self.values(cls, table, section, paths)
        return None if values is None else self.instance(cls, values, section, paths)

    def values(
        self,
        cls: type,
        table: Mapping[str, Any],
        section: str,
        paths: Mapping[str, str] | None = None,
        given: Collection[str] = (),
    ) -> dict[str, Any] | None:
        """The values of a class's fields, each checked on its own; None if one is wrong or missing.

        Fields in `given` are left to the caller.
        """
        hints = get_type_hints(cls, include_extras=True)
        values: dict[str, Any] = {}
        is_complete = True
        for field in attrs.fields(cls):
            key = (paths or {}).get(field.name) or _join(section, field.name)
            if field.name in given or not field.init:
                continue
            if field.name in table:
                try:
                    values[field.name] = self._value(field, hints[field.name], table[field.name])
                except Exception as error:  # a plugin's types and validators can raise anything
                    self.report(key, str(error))
                    is_complete = False
            elif field.default is attrs.NOTHING:
                self.report(key, "is missing", field_docs(cls).get(field.name, "").rstrip("."))
                is_complete = False
        return values if is_complete else None

    def instance(
        self, cls: type[ConfigT], values: Mapping[str, Any], section: str, paths: Mapping[str, str] | None = None
    ) -> ConfigT | None:
        """An instance of `cls`, or None if it refuses the values; what is wrong with them taken together is noted."""
        try:
            config = cls(**values)
        except Exception as error:  # a plugin's class can raise anything
            self.report(section, f"cannot be used: {error}")
            return None
        try:
            if isinstance(config, Component):
                problems = collect_problems(config, "problems")
            else:
                problems = list(getattr(config, "problems", list)())
        except PluginError as error:
            self.report(section, str(error))
            return None
        for problem in problems:
            self.report((paths or {}).get(problem.key) or _join(section, problem.key), problem.message, problem.hint)
        return config

    def _value(self, field: attrs.Attribute[Any], type_: Any, value: Any) -> Any:
        """The value as its type; raises with the end of a sentence that starts with the key."""
        structured = self._converter.structure(value, type_)
        if field.validator is not None:
            try:
                field.validator(None, field, structured)
            except (ValueError, TypeError) as error:
                raise ValueError(_in_words(error, structured)) from error
        return structured


def _join(section: str, name: str) -> str:
    key = name if re.fullmatch(r"[\w\[\].-]+", name) else repr(name)
    return f"{section}.{key}" if section else key


def _in_words(error: Exception, value: object) -> str:
    """A validator's message, without the field's name in front."""
    text = re.sub(r"^'[^']*' ", "", str(error.args[0]) if error.args else str(error))
    comparison = re.match(r"must be ([<>]=?) ([^:]*)", text)
    if comparison:
        return f"must be {COMPARISONS[comparison[1]]} {comparison[2]}, not {toml_repr(value)}"
    return "must not be empty" if text.startswith("Length of") else text
