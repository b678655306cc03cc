"""Config files as text: the resolved config beside the weights, and a commented starter."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
import tomlkit

from lorakit.api.components import Component, ObserverConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.config.datasets import DataSection, DatasetConfig, SubsetConfig
from lorakit.config.field_docs import field_docs
from lorakit.config.load import COMPONENT_SECTIONS, PLAIN_SECTIONS
from lorakit.config.train_config import TrainConfig
from lorakit.plugins.catalog import Catalog
from lorakit.utils.plain import plain, toml_value


def to_toml(config: TrainConfig, catalog: Catalog | None = None) -> str:
    """The whole config, defaults included, as TOML that reads back as an equal config.

    With a catalog, components whose name two distributions share are written as `distribution:name`.
    """
    document = tomlkit.document()
    for section, table in to_tables(config, catalog).items():
        document.add(section, tomlkit.item(table))
    return tomlkit.dumps(document)


def to_tables(config: TrainConfig, catalog: Catalog | None = None) -> dict[str, Any]:
    """What `to_toml` writes, as plain values by section; keys that are not set are absent."""
    full_name = (catalog or Catalog()).full_name
    sections = ("model", "data", *COMPONENT_SECTIONS, *PLAIN_SECTIONS)
    tables: dict[str, Any] = {section: _table(getattr(config, section), full_name) for section in sections}
    if config.observers:
        tables["observers"] = [_table(observer, full_name) for observer in config.observers]
    return tables


def _table(config: Any, full_name: Callable[[type[Component]], str]) -> dict[str, Any]:
    """The fields of one section that are not None, with the component's name in front."""
    table: dict[str, Any] = {}
    if isinstance(config, Component):
        table[config.name_key] = full_name(type(config))
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        if isinstance(value, tuple) and value and attrs.has(type(value[0])):
            table[field.name] = [_table(item, full_name) for item in value]
        elif isinstance(value, Component):  # whose keys are in the same table
            options = _table(value, full_name)
            table |= {field.name: options.pop("name"), **options}
        elif value is not None:
            table[field.name] = plain(value)
    return table


STARTER_VALUES: Mapping[str, Mapping[str, Any]] = {
    "model": {"path": "v1-5-pruned.safetensors"},
    "data": {"image_dir": "photos", "resolution": 512, "enable_bucket": True, "num_repeats": 10},
    "network": {"name": "lierla", "rank": 16, "alpha": 16.0},
    "optimizer": {"name": "adamw", "lr": 1e-4},
    "lr_scheduler": {"name": "constant"},
    "attention": {"name": "sdpa"},
    "training": {"max_epochs": 10, "mixed_precision": "auto", "cuda_graphs": "auto"},
    "loss": {"type": "l2"},
    "timesteps": {"name": "uniform"},
    "output": {"dir": "out", "name": "my_lora", "save_every_n_epochs": 1},
    "metadata": {},
    "saver": {"name": "safetensors"},
}
"""What a starter config sets; every other key is a comment with its default."""

STARTER_OBSERVERS: Mapping[str, Any] = {
    "dir": "logs",
    "prompts": "prompts.txt",
    "every_n_epochs": 1,
    "repo_id": "me/my-lora",
}
"""What the commented observers of a starter config set, each what it has of these."""

_PREAMBLE = """\
# A training run of lorakit:  lorakit train THIS_FILE
#
# A line that starts with "# key =" shows an option and its default; remove the "# " to change it.
# Relative paths are relative to this file. `lorakit check THIS_FILE` validates it."""

_COMMENT_COLUMN = 46
_WIDTH = 120


def starter(catalog: Catalog, values: Mapping[str, Mapping[str, Any]] = STARTER_VALUES) -> str:
    """A config file to start from, commented with the components' own help texts."""
    parts = [_PREAMBLE]
    for section, settings in values.items():
        choices, classes = _what_fills(section, settings, catalog)
        lines = _field_lines(classes, settings)
        if section == "model":
            lines += _line("# family =", f"Type of the base model; detected if absent. One of: {choices}.")
        elif choices:
            base, default = COMPONENT_SECTIONS[section]
            name = settings.get(base.name_key, default)
            lines[:0] = _line(f'{base.name_key} = "{name}"', f"One of: {choices}.")
        parts.append("\n".join([f"[{section}]", *lines]))
    parts += _commented_observers(catalog)
    return "\n\n".join(parts) + "\n"


def _what_fills(section: str, settings: Mapping[str, Any], catalog: Catalog) -> tuple[str, Sequence[type]]:
    """The names to choose from in a section, and the classes whose fields are its keys."""
    if section == "data":
        return "", [SubsetConfig, DatasetConfig, DataSection]
    if section in PLAIN_SECTIONS:
        return "", [PLAIN_SECTIONS[section]]
    base, default = COMPONENT_SECTIONS.get(section, (ModelFamilyConfig, "sd1"))
    return ", ".join(catalog.of_kind(base)), [catalog.find(base, settings.get(base.name_key, default))]


def _commented_observers(catalog: Catalog) -> list[str]:
    """Each observer that has something to set up, as a table to uncomment."""
    tables = []
    for name, (registration, *_) in catalog.of_kind(ObserverConfig).items():
        component = registration.component
        if any(field.default is attrs.NOTHING for field in attrs.fields(component)):
            lines = ["# [[observers]]", *_line(f'# name = "{name}"', (component.__doc__ or "").split("\n")[0])]
            tables.append("\n".join(lines + _field_lines([component], STARTER_OBSERVERS, "# ")))
    return tables


def _field_lines(classes: Sequence[type], settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The lines of each key: those with a value in `settings` in its order, then the others."""
    lines: dict[str, list[str]] = {name: [] for name in settings}
    for cls in classes:
        types = get_type_hints(cls)
        for field in attrs.fields(cls):
            text = field_docs(cls).get(field.name, "") + _choices(types[field.name])
            if field.name in settings:
                lines[field.name] = _line(f"{prefix}{field.name} = {toml_value(settings[field.name])}", text)
            elif field.name not in ("subsets", "datasets"):
                default = "" if field.default in (None, attrs.NOTHING) else toml_value(field.default)
                lines[field.name] = _line(f"# {field.name} = {default}".rstrip(), text)
    return [line for own in lines.values() for line in own]


def _choices(type_: Any) -> str:
    """The values that a key may have, where they are few."""
    members = get_args(type_) if get_origin(type_) in (Union, UnionType) else [type_]
    choices = [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if choices and bool in members:
        choices = ["true", "false", *choices]
    return f" One of: {', '.join(choices)}." if choices else ""


def _line(setting: str, text: str) -> list[str]:
    """A setting, with its help text in a second column."""
    wrapped = textwrap.wrap(text, _WIDTH - _COMMENT_COLUMN - 2) or [""]
    starts = [setting, *[""] * (len(wrapped) - 1)]
    return [f"{start:<{_COMMENT_COLUMN}}# {line}".rstrip() for start, line in zip(starts, wrapped, strict=True)]
