"""From a TOML table to a frozen config class, collecting every problem on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import attrs

from lorakit.config.fields import field_docs
from lorakit.config.suggestions import hint_for
from lorakit.config.values import shown, value_converter
from lorakit.errors import Problem

ConfigT = TypeVar("ConfigT")


class TableReader:
    """Structures the tables of one config file and remembers all that is wrong with them."""

    def __init__(self, base: Path, file: str = "") -> None:
        """`base` is what relative paths are relative to; `file` is put in front of keys in messages."""
        self.problems: list[Problem] = []
        self.base = base
        self._file = f"{file}: " if file else ""
        self._converter = value_converter(base)

    def report(self, key: str, message: str, hint: str = "") -> None:
        """Note one problem."""
        self.problems.append(Problem(f"{self._file}{key}", message, hint))

    def table(self, tables: Mapping[str, Any], key: str) -> dict[str, Any]:
        """A sub-table by its key, empty where it is absent or not a table (which is noted)."""
        found = tables.get(key, {})
        if isinstance(found, Mapping):
            return dict(found)
        self.report(key, f"must be a table, [{key}], not {shown(found)}")
        return {}

    def refuse_unknown(self, table: Mapping[str, Any], known: Collection[str], section: str) -> None:
        """Note each key of the table that is not known."""
        for name in table:
            if name not in known:
                self.report(_join(section, name), "is not a known key", hint_for(section, name, known))

    def structure(
        self, cls: type[ConfigT], table: Mapping[str, Any], section: str, paths: Mapping[str, str] | None = None
    ) -> ConfigT | None:
        """An instance of `cls` from a table, or None when something is wrong with it.

        `paths` gives the full key of a field that was written elsewhere than in this section.
        """
        before = len(self.problems)
        self.refuse_unknown(table, [field.name for field in attrs.fields(cls)], section)  # type: ignore[arg-type]
        hints = get_type_hints(cls, include_extras=True)
        values: dict[str, Any] = {}
        for field in attrs.fields(cls):  # type: ignore[arg-type]
            key = (paths or {}).get(field.name) or _join(section, field.name)
            if field.name in table:
                self._structure_field(cls, field, hints[field.name], table[field.name], key, values)
            elif field.default is attrs.NOTHING:
                self.report(key, "is missing", field_docs(cls)[field.name].rstrip("."))
        if len(self.problems) > before:
            return None
        config = cls(**values)
        for problem in getattr(config, "problems", lambda: ())():
            key = (paths or {}).get(problem.key) or _join(section, problem.key)
            self.report(key, problem.message, problem.hint)
        return config if len(self.problems) == before else None

    def _structure_field(  # noqa: PLR0913
        self, cls: type, field: attrs.Attribute[Any], type_: Any, value: Any, key: str, values: dict[str, Any]
    ) -> None:
        try:
            values[field.name] = value if attrs.has(_element(type_)) else self._converter.structure(value, type_)
            if field.validator is not None:
                field.validator(None, field, values[field.name])
        except (ValueError, TypeError) as error:
            self.report(key, _in_words(error, values.get(field.name, value)))


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section and name else section or name


def _element(type_: Any) -> Any:
    """What a sequence type holds; sub-tables are structured by whoever reads them, one by one."""
    arguments = getattr(type_, "__args__", ())
    return arguments[0] if getattr(type_, "__origin__", None) is tuple else type_


def _in_words(error: Exception, value: object) -> str:
    """A validator's message as the end of a sentence that starts with the key."""
    text = str(error.args[0]) if error.args else str(error)
    if text.startswith("must"):
        return text
    for sign, words in {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}.items():
        if f" must be {sign} " in text:
            bound = text.split(f" must be {sign} ")[1].split(":")[0]
            return f"must be {words} {bound}, not {shown(value)}"
    if "Length of" in text:
        return "must not be empty"
    if "must match regex" in text:
        return f"must be a plain name, not {shown(value)}"
    return text
