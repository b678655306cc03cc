"""Values as TOML and JSON have them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A value with paths as texts, sequences as lists, and tables without keys that are None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def toml_key(name: str) -> str:
    """A key as TOML writes it, in quotation marks where it needs them."""
    import tomlkit

    return str(tomlkit.key(name).as_string())


def toml_value(value: Any) -> str:
    """A plain value as TOML writes it, on one line."""
    import tomlkit

    value = plain(value)
    if isinstance(value, dict):
        items = ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    return str(tomlkit.item(value).as_string())
