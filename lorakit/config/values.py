"""Strict structuring of single TOML values: nothing is converted that the user did not write.

cattrs by default turns 8.7 into 8 and "false" into True; here each type takes its own values only.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from cattrs import Converter


def value_converter(base: Path) -> Converter:
    """A converter for the values of one config file; relative paths are relative to `base`.

    Its `structure` raises ValueError with the end of a sentence: "must be a whole number, not 8.5".
    """
    converter = Converter(detailed_validation=False)
    converter.register_structure_hook(bool, _exactly(bool, "true or false"))
    converter.register_structure_hook(int, _exactly(int, "a whole number"))
    converter.register_structure_hook(str, _exactly(str, 'a text in quotes, such as "text"'))
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(Path, lambda value, _: _path(value, base))
    converter.register_structure_hook_func(lambda type_: get_origin(type_) is Literal, _choice)
    converter.register_structure_hook_func(
        lambda type_: get_origin(type_) is tuple, lambda value, type_: _sequence(value, type_, converter)
    )
    converter.register_structure_hook_func(
        lambda type_: get_origin(type_) in (Union, types.UnionType),
        lambda value, type_: _union(value, type_, converter),
    )
    return converter


def shown(value: object) -> str:
    """A value as it stands in a TOML file, cut where it is long."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _exactly(type_: type, description: str) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, type_) or (type_ is int and isinstance(value, bool)):
            raise ValueError(f"must be {description}, not {shown(value)}")
        return value

    return structure


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {shown(value)}")
    if value != value or abs(value) == float("inf"):
        raise ValueError(f"must be a finite number, not {shown(value)}")
    return float(value)


def _path(value: Any, base: Path) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"must be a path in quotes, not {shown(value)}")
    return (base / Path(value).expanduser()).absolute()


def _choice(value: Any, type_: Any) -> Any:
    choices = get_args(type_)
    # `True in (1,)` holds in Python, so the types are compared as well.
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    raise ValueError(f"must be one of {', '.join(shown(choice) for choice in choices)}, not {shown(value)}")


def _sequence(value: Any, type_: Any, converter: Converter) -> tuple[Any, ...]:
    elements = get_args(type_)
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list in [ ], not {shown(value)}")
    if elements[-1] is Ellipsis:
        elements = (elements[0],) * len(value)
    if len(elements) != len(value):
        raise ValueError(f"must have {len(elements)} values, not {len(value)}")
    return tuple(converter.structure(item, element) for item, element in zip(value, elements, strict=True))


def _union(value: Any, type_: Any, converter: Converter) -> Any:
    error = ValueError(f"must not be {shown(value)}")
    for member in get_args(type_):
        if member is not type(None):
            try:
                return converter.structure(value, member)
            except ValueError as problem:
                error = problem
    raise error
