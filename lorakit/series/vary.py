"""Runs that vary keys of one config: values as they are typed, and every combination of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from attrs import frozen

from lorakit.errors import ConfigError, Problem

_HINT = "--vary optimizer.lr=5e-5,1e-4, without spaces"


@frozen
class Variation:
    """One combination of values."""

    label: str
    """For tables: `lr=5e-5 rank=8`."""
    suffix: str
    """For file names: `lr5e-5-rank8`."""
    overrides: tuple[str, ...]
    """As `--set` takes them: `optimizer.lr=5e-5`."""


def variations(texts: Sequence[str]) -> list[Variation]:
    """Every combination of `KEY=VALUE,VALUE`, the last key changing fastest. Raises ConfigError."""
    problems = [Problem("--vary", f"must be KEY=VALUE,VALUE, not {text!r}", _HINT) for text in texts if "=" not in text]
    pairs = [
        (key.strip(), split_values(values)) for key, _, values in (text.partition("=") for text in texts if "=" in text)
    ]
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    problems += [Problem("--vary", f"varies {key} twice", "give all of its values once") for key in twice]
    if "output.name" in keys:
        problems.append(Problem("--vary", "output.name is made of the values of the other keys", "leave it out"))
    for key, values in pairs:
        if "" in values or len(set(values)) < len(values):
            what = "lacks a value" if "" in values else "has a value twice"
            problems.append(Problem("--vary", f"{key} {what}", _HINT))
    if problems:
        raise ConfigError(problems)
    names = _short_names(keys)
    found = []
    for chosen in itertools.product(*(values for _, values in pairs)):
        settings = list(zip(names, chosen, strict=True))
        found.append(
            Variation(
                label=" ".join(f"{name}={value}" for name, value in settings),
                suffix="-".join(_in_file_name(f"{name}{value}") for name, value in settings),
                overrides=tuple(f"{key}={value}" for key, value in zip(keys, chosen, strict=True)),
            )
        )
    return found


def split_values(text: str) -> list[str]:
    """Values between commas; those inside of brackets and quotation marks belong to a value."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth <= 0:
            values.append("")
            continue
        values[-1] += character
    return [value.strip() for value in values]


def _short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each key; more of those that share it."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def _in_file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")
