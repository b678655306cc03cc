"""Strict structuring of single TOML values: nothing is converted that the user did not write.

cattrs by default turns 8.7 into 8 and "false" into True; here each type takes its own values only.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from cattrs import Converter

from lorakit.checkpoints import ModelPath, locate
from lorakit.errors import ModelError

LARGEST_INTEGER = 2**63 - 1
"""TOML's own limit on whole numbers."""


def value_converter(base: Path) -> Converter:
    """A converter for the values of one config file; relative paths are relative to `base`.

    Its `structure` raises ValueError with the end of a sentence: "must be a whole number, not 8.5".
    """
    converter = Converter(detailed_validation=False, forbid_extra_keys=True)
    converter.register_structure_hook(bool, _boolean)
    converter.register_structure_hook(int, _whole_number)
    converter.register_structure_hook(str, _text)
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(Path, lambda value, _: _path(value, base))
    converter.register_structure_hook_func(lambda type_: type_ is ModelPath, lambda value, _: _model_path(value, base))
    by_origin: Mapping[Callable[[Any, Any, Converter], Any], tuple[object, ...]] = {
        _choice: (Literal,),
        _sequence: (tuple, list, Sequence),
        _mapping: (dict, Mapping),
        _union: (Union, types.UnionType),
    }
    for hook, origins in by_origin.items():
        converter.register_structure_hook_func(
            lambda type_, origins=origins: get_origin(type_) in origins,  # type: ignore[misc]
            lambda value, type_, hook=hook: hook(value, type_, converter),  # type: ignore[misc]
        )
    return converter


_ESCAPED = {"\b": r"\b", "\t": r"\t", "\n": r"\n", "\f": r"\f", "\r": r"\r", "\x1b": r"\e"}
"""Characters that TOML's double quotation marks make of a backslash and a letter."""


def lost_backslash(value: str) -> str:
    r"""That a path such as "C:\new\train" holds other characters than it seems to; empty where it holds none."""
    written = "".join(_ESCAPED.get(character, character) for character in value)
    if written == value:
        return ""
    cure = f"write '{written}' or \"{written.replace(chr(92), '/')}\""
    return f"between double quotation marks \\ is special; {cure}"


class TypedInteger(int):
    """A whole number that was typed on a command line, which is text where a key takes text."""

    text: str
    """As it was typed."""


class TypedNumber(float):
    """A number that was typed on a command line, which is text where a key takes text."""

    text: str
    """As it was typed."""


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be written to a file.

    Half of a surrogate pair cannot, which JSON can hold, and which Python puts for a byte of a name that is not UTF-8.
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def toml_repr(value: object) -> str:
    """A value as written in a TOML file, truncated if long."""
    text = _as_toml(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return "a number of more than 18 digits"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_as_toml(item) for item in value)}]"
    return "null" if value is None else repr(value)


def _boolean(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {toml_repr(value)}")
    return value


def _text(value: Any, _: Any) -> str:
    if isinstance(value, TypedInteger | TypedNumber):
        return value.text
    if not isinstance(value, str):
        raise ValueError(f'must be a text in quotes, such as "text", not {toml_repr(value)}')
    if not is_text(value):
        raise ValueError(f"must be UTF-8, not {toml_repr(value)}")
    return value


def _whole_number(value: Any, _: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST_INTEGER:
        raise ValueError(f"must be a whole number, not {toml_repr(value)}")
    return int(value)


def _number(value: Any, _: Any) -> float:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER:
        return float(value)
    if not isinstance(value, float):
        raise ValueError(f"must be a number, not {toml_repr(value)}")
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {toml_repr(value)}")
    return float(value)


def _path(value: Any, base: Path) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"must be a path in quotes, not {toml_repr(value)}")
    if any(character in value for character in _ESCAPED) and not os.path.lexists(base / value):
        raise ValueError(lost_backslash(value))
    try:
        path = (base / Path(value).expanduser()).absolute()
    except RuntimeError as error:
        raise ValueError(f"{toml_repr(value)} starts with the home folder of an unknown user") from error
    if not is_text(str(path)):
        raise ValueError(f"must be a UTF-8 path, not {toml_repr(str(path))}; rename the file or folder")
    return path


def _model_path(value: Any, base: Path) -> ModelPath:
    _path(value, base)
    try:
        return ModelPath(str(locate(value, base)))
    except (ModelError, OSError) as error:
        raise ValueError(str(error)) from error


def _choice(value: Any, type_: Any, _: Converter) -> Any:
    choices = get_args(type_)
    # `True in (1,)` holds in Python, so the types are compared as well.
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    raise ValueError(f"must be one of {', '.join(toml_repr(choice) for choice in choices)}, not {toml_repr(value)}")


def _sequence(value: Any, type_: Any, converter: Converter) -> Sequence[Any]:
    origin, elements = get_origin(type_), get_args(type_)
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list in [ ], not {toml_repr(value)}")
    if origin is not tuple or elements[-1] is Ellipsis:
        elements = (elements[0],) * len(value)
    if len(elements) != len(value):
        raise ValueError(f"must have {len(elements)} values, not {len(value)}")
    structured = (converter.structure(item, element) for item, element in zip(value, elements, strict=True))
    return list(structured) if origin is list else tuple(structured)


def _mapping(value: Any, type_: Any, converter: Converter) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a table, not {toml_repr(value)}")
    _, element = get_args(type_)
    return {key: converter.structure(item, element) for key, item in value.items()}


def _union(value: Any, type_: Any, converter: Converter) -> Any:
    """The value as the first type that takes it; what is wrong with it says what any of them would take."""
    problems = []
    for member in get_args(type_):
        if member is not type(None):
            try:
                return converter.structure(value, member)
            except ValueError as problem:
                problems.append(str(problem))
    start, end = "must be ", f", not {toml_repr(value)}"
    if all(problem.startswith(start) and problem.endswith(end) for problem in problems):
        wanted = (problem.removeprefix(start).removesuffix(end) for problem in problems)
        raise ValueError(start + ", or ".join(wanted) + end)
    raise ValueError(problems[-1])
