"""Keys set on the command line with `--set KEY=VALUE`, which override the file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorakit.config.suggestions import hint_for
from lorakit.config.values import TypedInteger, TypedNumber
from lorakit.errors import ConfigError, Problem

PRECEDENCE: Mapping[str, tuple[str, ...]] = {
    "max_steps": ("max_epochs",),
    "save_every_n_epochs": ("save_n_epoch_ratio",),
    "every_n_steps": ("every_n_epochs",),
    "rank": ("rank_from_weights",),
    "alpha": ("rank_from_weights",),
    "conv_rank": ("rank_from_weights",),
    "conv_alpha": ("rank_from_weights",),
}
"""Keys that have no effect beside another of the same table, with those others. Where one of the first is typed, the
others of the file do not count."""

_UNSET = ("none", "null")


def apply_overrides(tables: dict[str, Any], overrides: Sequence[str], keys: Collection[str]) -> dict[str, Any]:
    """The tables with each `a.b[0].c=value` set; a value that is not TOML is taken as text, and `none` unsets a key.

    `keys` are all that a config can have. Raises ConfigError with everything that is wrong with the overrides.
    """
    problems: list[Problem] = []
    typed = [_names(override.partition("=")[0]) for override in overrides]
    for override, names in zip(overrides, typed, strict=True):
        key, separator, text = (part.strip() for part in override.partition("="))
        if not separator or not all(names):
            hint = "--set optimizer.lr=1e-4, without spaces around ="
            problems.append(Problem("--set", f"must be KEY=VALUE, not {override!r}", hint))
            continue
        try:
            table, last = _table(tables, names)
            if text.lower() in _UNSET:
                problems += _unset(table, last, key, keys)
                continue
            for other in PRECEDENCE.get(names[-1], ()) if isinstance(table, dict) else ():
                if [*names[:-1], other] not in typed:
                    table.pop(other, None)
            table[last] = _value(text)
        # A number that counts too far, a word where a list wants a number, a key inside what is no table.
        except (IndexError, ValueError, TypeError, AttributeError):
            problems.append(Problem("--set", f"{key} is not the path of a key", "list entries are counted from 0"))
    if problems:
        raise ConfigError(problems)
    return tables


def _names(key: str) -> list[str]:
    return re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")


def _table(tables: dict[str, Any], names: Sequence[str]) -> tuple[Any, Any]:
    """The table or list that holds a key, made where it is missing, and the key or index in it."""
    *sections, last = names
    target: Any = tables
    for name in sections:
        target = target[int(name)] if isinstance(target, list) else target.setdefault(name, {})
    return target, int(last) if isinstance(target, list) else last


def _unset(table: Any, last: Any, key: str, keys: Collection[str]) -> list[Problem]:
    """Remove a key; a problem if no config could have it, as it may be misspelt."""
    if isinstance(table, list) or last in table:
        del table[last]
        return []
    bare = re.sub(r"\[\d+\]", "", key)
    section, _, name = bare.rpartition(".")
    known = [own.removeprefix(f"{section}.") for own in keys if own.startswith(f"{section}.")]
    sections = {own.partition(".")[0] for own in keys}
    # Deeper than a section, as in data.datasets[0], or below a table of any keys.
    if bare in keys or bare in sections or bare.count(".") > 1:
        return []
    hint = hint_for(section, name, known or sorted(sections), {})
    return [Problem(key, "is not a known key", hint)]


def _value(text: str) -> Any:
    """The TOML value of a text; the text itself if it is not TOML, or a date, which no key takes."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        # Shells take the quotation marks out of ["unet", "text_encoder"].
        words = re.fullmatch(r"\[\s*([\w./-]+(?:\s*,\s*[\w./-]+)*)\s*,?\s*\]", text)
        return [_value(word.strip()) for word in words[1].split(",")] if words else text
    value = found["value"]
    if found.keys() != {"value"}:
        return text
    if type(value) in (int, float):
        typed: TypedInteger | TypedNumber = TypedInteger(value) if isinstance(value, int) else TypedNumber(value)
        typed.text = text
        return typed
    return value if isinstance(value, str | bool | list | dict) else text
