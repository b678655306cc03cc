"""A config on its way from sd-scripts' options: what it is made from, what has been written so far, and its file."""

from __future__ import annotations

import ast
import os
import re
import textwrap
import tomllib
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path, PureWindowsPath
from typing import Any

import attrs
from attrs import Factory, define, frozen

from lorakit.api.components import ModelPart
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.config.load import KINDS, known_keys
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.sd_scripts_option import Option
from lorakit.config.table_reader import field_names
from lorakit.config.training_scripts import Script
from lorakit.errors import ConfigError, Problem
from lorakit.plugins.catalog import Catalog
from lorakit.utils.plain import toml_key, toml_value
from lorakit.utils.wording import printable

_MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class OptionStatus(Enum):
    """Whether an option can be used."""

    WORKS = "works"
    """A key does the same."""
    NOT_NEEDED = "not needed"
    """Nothing has to be done for it."""
    UNSUPPORTED = "later"
    """Nothing does the same."""


def keys_and_choices(catalog: Catalog) -> dict[str, object]:
    """All keys of a config file with their defaults, and one per component: `network.name = "lierla"`."""
    choices = (
        f'{section}.{base.name_key} = "{name}"' for section, base in KINDS.items() for name in catalog.of_kind(base)
    )
    return {**known_keys(catalog), **dict.fromkeys(choices, attrs.NOTHING)}


def option_status(option: Option, keys: Collection[str]) -> OptionStatus:
    """The status of an option given these keys; keys of plugins count as available."""
    key, _, value = option.key.partition(" = ")
    if option.plugin:
        return OptionStatus.WORKS
    if key and key in keys and (not value or not key.endswith((".name", ".family")) or option.key in keys):
        return OptionStatus.WORKS
    return OptionStatus.NOT_NEEDED if option.unneeded else OptionStatus.UNSUPPORTED


def target_of(option: Option) -> tuple[str, str, object]:
    """Section, key, and the value that a flag gives it; True where the table names none."""
    key, _, value = option.key.partition(" = ")
    section, _, name = key.partition(".")
    return section, name, tomllib.loads(f"value = {value}")["value"] if value else True


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
    """The options of one call of a script of sd-scripts."""

    given: Mapping[str, Any]
    """Those that were given, by name."""
    keys: Mapping[str, object]
    """All keys of lorakit, with their defaults."""
    script: Script
    """The script."""
    family: type[ModelFamilyConfig]
    """The family of the base model."""
    folder: Path
    """What relative paths in the options are relative to."""
    target: Path
    """What relative paths in the config are to be relative to."""
    sources: Mapping[str, str] = Factory(dict)
    """The names, in a file, of the options that come from it."""

    def get(self, name: str) -> Any:
        """The value of an option, its default where it was not given."""
        return self.given.get(name, OPTIONS[name].default_of(self.script))

    def model(self) -> ModelFamilyConfig:
        """The base model, for what depends on its files."""
        path = self.get("pretrained_model_name_or_path")
        is_there = os.path.exists(self.folder / path)  # noqa: PTH110 - raises nothing
        return self.family(path=str(self.folder / path) if is_there else path)

    def state(self, name: str) -> OptionStatus:
        """What can be done with an option."""
        return option_status(OPTIONS[name], self.keys)

    def default_of(self, key: str) -> object:
        """What a key such as `data.resolution` is in lorakit when absent, with models of this family."""
        return self.family.dataset_defaults.get(key.removeprefix("data."), self.keys[key])

    def has_key(self, key: str) -> bool:
        """Whether the family has a key of `[model]`; true for all other keys."""
        section, _, name = key.partition(".")
        return section != "model" or name in (ModelFamilyConfig.name_key, *field_names(self.family))

    def parts(self, names: Collection[str]) -> list[str]:
        """The parts of the family that sd-scripts means by `unet` and `text_encoder`, which is all text encoders."""

        def kind(part: ModelPart) -> str:
            return "text_encoder" if part.encoders else "unet"

        return [part.name for part in self.family.parts if kind(part) in names]

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
        is_absolute = Path(path).is_absolute() or PureWindowsPath(path).is_absolute()
        if self.folder == self.target or path.startswith("~") or is_absolute:
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
    defaults: list[Problem] = Factory(list)
    """What lorakit does in another way where options are absent; too usual for a warning."""

    def set(self, section: str, key: str, setting: Setting) -> None:
        """Write a key."""
        self.sections.setdefault(section, {})[key] = setting

    def mark_unsupported(self, name: str, value: object, reason: str = "") -> None:
        """Note that an option is not part of the config."""
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        text = f"--{name}" if value is True else f"--{name}={'…' if name in SECRETS else shown}"
        self.remarks.append(Problem(text, "has no counterpart", reason))

    def note(self, name: str, message: str) -> None:
        """Note something else about an option."""
        self.remarks.append(Problem(f"--{name}", message))

    def note_default(self, name: str, message: str) -> None:
        """Note, in the file alone, what lorakit does in another way as an option is absent."""
        self.defaults.append(Problem(f"--{name}", message))

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


def _values(table: Table) -> dict[str, Any]:
    return {key: setting.value for key, setting in table.items()}


_SECTIONS = (
    "model", "data", "network", "optimizer", "lr_scheduler", "attention", "training", "timesteps", "loss", "output",
    "metadata", "saver",
)  # fmt: skip
_COLUMN = 40
_WIDTH = 116
_PREAMBLE = """\
# A training run of lorakit, from options of sd-scripts. Behind each key is the option, or the field of another
# program's file, that it comes from. Relative paths are relative to this file."""


def to_text(draft: Draft) -> str:
    """The config file: each key with the option it comes from, and what differs from sd-scripts as comments."""
    parts = [_PREAMBLE]
    if differences := [*draft.remarks, *draft.defaults]:
        remarks = (" ".join(printable(str(remark)).split()) for remark in differences)
        comment = textwrap.TextWrapper(_WIDTH, "#   ", "#     ", break_long_words=False)
        parts.append("\n".join(["# Not as with sd-scripts:", *map(comment.fill, remarks)]))
    for section in _SECTIONS:
        if table := draft.sections.get(section, {}):
            parts.append(_table(f"[{section}]", table))
        if section == "data":
            parts += [_table("[data.general]", draft.general)] if draft.general else []
            for own, subsets in draft.datasets:
                parts.append(_table("[[data.datasets]]", own))
                parts += [_table("[[data.datasets.subsets]]", subset) for subset in subsets]
    parts += [_table("[[observers]]", observer) for observer in draft.observers]
    return "\n\n".join(parts) + "\n"


def _table(heading: str, table: Table) -> str:
    # The name of a component says what the other keys are.
    names = sorted(table, key=lambda key: key != "name" or "dir" in table)
    lines = [f"{toml_key(name)} = {toml_value(table[name].value)}" for name in names]
    described = (
        f"{line:<{_COLUMN - 2}}  # {printable(table[name].source)}" for line, name in zip(lines, names, strict=True)
    )
    return "\n".join([heading, *described])
