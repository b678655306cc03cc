"""Config files as text: the resolved config beside the weights, and a commented starter."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import tomlkit

from lorakit.components import Component, ModelFamilyConfig
from lorakit.config.datasets import DatasetConfig, DataSection, SubsetConfig
from lorakit.config.fields import field_docs
from lorakit.config.reading import COMPONENT_SECTIONS
from lorakit.config.sections import LossSection, OutputSection, TrainConfig, TrainingSection
from lorakit.plugins import Catalog


def to_toml(config: TrainConfig) -> str:
    """The whole config, defaults included, as TOML that reads back as an equal config."""
    document = tomlkit.document()
    for section in ("model", "data", *COMPONENT_SECTIONS, "training", "loss", "output"):
        document.add(section, tomlkit.item(_table(getattr(config, section))))
    if config.observers:
        document.add("observers", tomlkit.item([_table(observer) for observer in config.observers]))
    return tomlkit.dumps(document)


def _table(config: Any) -> dict[str, Any]:
    """The fields of one section that are not None, with the component's name in front."""
    table: dict[str, Any] = {}
    if isinstance(config, Component):
        table["family" if isinstance(config, ModelFamilyConfig) else "name"] = config.name
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        if value is not None:
            table[field.name] = _plain(value)
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _table(value) if attrs.has(type(value)) else value


STARTER_VALUES: Mapping[str, Mapping[str, Any]] = {
    "model": {"path": "v1-5-pruned.safetensors"},
    "data": {"image_dir": "photos", "resolution": 512, "enable_bucket": True, "num_repeats": 10},
    "network": {"name": "lierla", "rank": 16, "alpha": 16.0},
    "optimizer": {"name": "adamw", "lr": 1e-4},
    "lr_scheduler": {"name": "constant"},
    "attention": {"name": "sdpa"},
    "training": {"max_epochs": 10, "mixed_precision": "no"},
    "loss": {},
    "output": {"dir": "out", "name": "my_lora", "save_every_n_epochs": 1},
    "saver": {"name": "safetensors"},
}
"""What a starter config sets; every other key stands in it as a comment with its default."""


def starter(catalog: Catalog, values: Mapping[str, Mapping[str, Any]] = STARTER_VALUES) -> str:
    """A config file to start from, commented with the components' own help texts."""
    parts = ["# A training run of lorakit. Lines that start with '# key =' show defaults; remove the '#' to change one."]
    for section, settings in values.items():
        parts.append(f"\n[{section}]\n{_section_text(section, dict(settings), catalog)}")
    parts.append('\n# [[observers]]\n# name = "tensorboard"\n# dir = "logs"')
    return "\n".join(parts) + "\n"


def _section_text(section: str, settings: dict[str, Any], catalog: Catalog) -> str:
    lines: list[str] = []
    if section in COMPONENT_SECTIONS:
        base, default = COMPONENT_SECTIONS[section]
        name = settings.pop("name", default)
        choices = " | ".join(catalog.of_kind(base))
        lines += [f'name = "{name}"', *_comment(f"one of: {choices}")]
        classes: Iterable[type] = [catalog.find(base, name)]
    else:
        classes = {
            "model": [catalog.find(ModelFamilyConfig, "sd1")],
            "data": [SubsetConfig, DatasetConfig, DataSection],
            "training": [TrainingSection],
            "loss": [LossSection],
            "output": [OutputSection],
        }[section]
    for cls in classes:
        lines += _field_lines(cls, settings)
    return "\n".join(lines)


def _field_lines(cls: type, settings: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for field in attrs.fields(cls):
        if field.name in ("subsets", "datasets"):
            continue
        if field.name in settings:
            line = f"{field.name} = {_toml(settings[field.name])}"
        elif field.default in (None, attrs.NOTHING):
            line = f"# {field.name} ="
        else:
            line = f"# {field.name} = {_toml(field.default)}"
        lines += [line, *_comment(field_docs(cls)[field.name])]
    return lines


def _toml(value: Any) -> str:
    return tomlkit.item(_plain(value)).as_string()


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="    # ", subsequent_indent="    # ")
