"""A config on its way from sd-scripts' options: what it is made from, and what has been written so far."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from attrs import Factory, define, frozen

from lorakit.config.sd_scripts import OPTIONS
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.option_status import OptionStatus, option_status

_MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@frozen
class Setting:
    """The value of a key, and where it comes from."""

    value: Any
    source: str
    """A remark for people: `--network_dim`."""


SECRETS = frozenset({"wandb_api_key", "huggingface_token"})
"""Options whose values are shown to nobody."""

Table = dict[str, Setting]
"""Settings by their keys."""


@frozen
class Command:
    """The options of one call of `train_network.py`."""

    given: Mapping[str, Any]
    """Those that were given, by name."""
    keys: Mapping[str, object]
    """All keys of lorakit, with their defaults."""
    folder: Path
    """What relative paths in the options are relative to."""
    target: Path
    """What relative paths in the config are to be relative to."""
    sources: Mapping[str, str] = Factory(dict)
    """The names, in a file, of the options that come from it."""

    def get(self, name: str) -> Any:
        """The value of an option, its default where it was not given."""
        return self.given.get(name, OPTIONS[name].default)

    def state(self, name: str) -> OptionStatus:
        """What can be done with an option."""
        return option_status(OPTIONS[name], self.keys)

    def setting(self, name: str, value: Any = None) -> Setting:
        """The setting from an option: `value`, or else the option's value."""
        default = "" if name in self.given else " is absent, this is its default"
        source = self.sources.get(name, f"--{name}{default}")
        return Setting(self.get(name) if value is None else value, source)

    def is_typed(self, name: str) -> bool:
        """Whether someone has asked for an option; programs write all that they have into their files."""
        return name in self.given and name not in self.sources

    def path(self, path: str) -> str:
        """A path as the config has to say it; `~` stays."""
        if self.folder == self.target or path.startswith("~") or _is_absolute(path):
            return path
        try:
            return os.path.relpath(self.folder / path, self.target)
        except ValueError:  # another drive
            return str(self.folder / path)

    def on_disk(self, path: str) -> Path:
        """Where the file or folder of a path is."""
        try:
            return self.folder / Path(path).expanduser()
        except RuntimeError:  # the home folder of a user who is not known
            return self.folder / path

    def model_path(self, path: str) -> str:
        """The base model: a path, or the name of a model on the Hub, which stays as it is."""
        is_id = _HUB_ID.fullmatch(path) and not path.lower().endswith(_MODEL_SUFFIXES)
        is_there = os.path.exists(self.folder / path)  # noqa: PTH110 - raises nothing
        return path if is_id and not is_there else self.path(path)

    def pairs(self, name: str) -> dict[str, str]:
        """The `key=value` texts of an option, both as they stand; raises ConfigError for one that is none."""
        pairs = {}
        for text in self.get(name):
            key, separator, value = text.partition("=")
            if not separator or not key.strip():
                raise ConfigError([Problem(f"--{name}", f"must be key=value, not {text!r}")])
            pairs[key.strip()] = value
        return pairs

    def parse_literals(self, name: str) -> dict[str, Any]:
        """The `key=value` texts of an option, with values of Python: `betas=0.9,0.999`. Raises ConfigError."""
        values = {}
        for key, text in self.pairs(name).items():
            try:
                values[key] = ast.literal_eval(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
                hint = "write True, False, a number, or a quoted string"
                raise ConfigError([Problem(f"--{name} {key}", f"is not a Python literal: {text}", hint)]) from error
        return values


@define
class Draft:
    """The tables of a config, with remarks."""

    sections: dict[str, Table] = Factory(dict)
    """All sections but datasets and observers."""
    general: Table = Factory(dict)
    """What all datasets share."""
    datasets: list[tuple[Table, list[Table]]] = Factory(list)
    """Each dataset with its subsets."""
    observers: list[Table] = Factory(list)
    """Logs."""
    remarks: list[Problem] = Factory(list)
    """What the config does not do, by option."""

    def set(self, section: str, key: str, setting: Setting) -> None:
        """Write a key."""
        self.sections.setdefault(section, {})[key] = setting

    def mark_unsupported(self, name: str, value: object, reason: str = "") -> None:
        """Note that an option is not part of the config."""
        text = f"--{name}" if value is True else f"--{name}={_as_typed(name, value)}"
        self.remarks.append(Problem(text, "has no counterpart", reason))

    def note(self, name: str, message: str) -> None:
        """Note something else about an option."""
        self.remarks.append(Problem(f"--{name}", message))

    def tables(self) -> dict[str, Any]:
        """The config as plain tables, as they are read from its file."""
        tables: dict[str, Any] = {section: _values(table) for section, table in self.sections.items()}
        data = tables.setdefault("data", {})
        if self.general:
            data["general"] = _values(self.general)
        if self.datasets:
            data["datasets"] = [
                {**_values(own), "subsets": [_values(subset) for subset in subsets]} for own, subsets in self.datasets
            ]
        return tables | ({"observers": [_values(table) for table in self.observers]} if self.observers else {})


def _is_absolute(path: str) -> bool:
    return Path(path).is_absolute() or PureWindowsPath(path).is_absolute()


def _values(table: Table) -> dict[str, Any]:
    return {key: setting.value for key, setting in table.items()}


def _as_typed(name: str, value: object) -> str:
    if name in SECRETS:
        return "…"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
