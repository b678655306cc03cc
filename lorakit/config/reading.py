"""Reading a config file: every problem at once, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomlkit
from attrs import evolve
from tomlkit.exceptions import TOMLKitError

from lorakit.checkpoints import describe, locate, summarize
from lorakit.components import (
    AttentionConfig,
    Component,
    LRSchedulerConfig,
    ModelFamilyConfig,
    NetworkConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
)
from lorakit.config.data_tables import read_data_section, read_toml
from lorakit.config.sections import LossSection, OutputSection, TrainConfig, TrainingSection
from lorakit.config.tables import TableReader
from lorakit.config.values import shown
from lorakit.errors import ConfigError, LorakitError, PluginError, Problem
from lorakit.plugins import Catalog

COMPONENT_SECTIONS: Mapping[str, tuple[type[Component], str]] = {
    "network": (NetworkConfig, "lierla"),
    "optimizer": (OptimizerConfig, "adamw"),
    "lr_scheduler": (LRSchedulerConfig, "constant"),
    "attention": (AttentionConfig, "sdpa"),
    "saver": (SaverConfig, "safetensors"),
}
"""Sections whose `name` key picks a component, with its kind and the name that counts when it is absent."""

SECTIONS = ("model", "data", *COMPONENT_SECTIONS, "training", "loss", "output", "observers")

ComponentT = TypeVar("ComponentT", bound=Component)


def read_config(path: Path, overrides: Sequence[str] = (), catalog: Catalog | None = None) -> TrainConfig:
    """The config in a TOML file, with `section.key=value` overrides applied.

    Raises ConfigError with every problem found.
    """
    try:
        tables = read_toml(path)
    except ValueError as error:
        raise ConfigError([Problem(str(path), str(error))]) from error
    return config_from_tables(_overridden(tables, overrides), path.absolute().parent, catalog)


def config_from_tables(tables: Mapping[str, Any], base: Path, catalog: Catalog | None = None) -> TrainConfig:
    """The config in tables as a TOML file holds them; relative paths are relative to `base`."""
    reader = TableReader(base)
    config = _Assembly(reader, catalog or Catalog.discover()).read(tables)
    if reader.problems or config is None:
        raise ConfigError(reader.problems)
    return config


class _Assembly:
    """Reads the sections one by one, so that a problem in one does not hide those in the next."""

    def __init__(self, reader: TableReader, catalog: Catalog) -> None:
        self.reader = reader
        self.catalog = catalog

    def read(self, tables: Mapping[str, Any]) -> TrainConfig | None:
        self.reader.refuse_unknown(tables, SECTIONS, "")
        sections: dict[str, Any] = {"model": self._model(self.reader.table(tables, "model"))}
        sections["data"] = read_data_section(self.reader, self.reader.table(tables, "data"))
        for section, (base, default) in COMPONENT_SECTIONS.items():
            sections[section] = self._component(base, self.reader.table(tables, section), section, default)
        plain = {"training": TrainingSection, "loss": LossSection, "output": OutputSection}
        for section, cls in plain.items():
            sections[section] = self.reader.structure(cls, self.reader.table(tables, section), section)
        sections["observers"] = self._observers(tables.get("observers", []))
        if self.reader.problems:
            return None
        config = TrainConfig(**sections)
        self.reader.problems += config.problems()
        return config

    def _component(
        self, base: type[ComponentT], table: dict[str, Any], section: str, default: str | None
    ) -> ComponentT | None:
        name = table.pop("name", default)
        if not isinstance(name, str):
            problem = "is missing" if name is None else f"must be a text in quotes, not {shown(name)}"
            self.reader.report(f"{section}.name", problem, f"one of {', '.join(self.catalog.of_kind(base))}")
            return None
        try:
            component = self.catalog.find(base, name)
        except PluginError as error:
            self.reader.report(f"{section}.name", str(error))
            return None
        return self.reader.structure(component, table, section)

    def _model(self, table: dict[str, Any]) -> ModelFamilyConfig | None:
        family = table.pop("family", None)
        path = table.get("path")
        if not isinstance(path, str) or not path:
            problem = "is missing" if path is None else f"must be a text in quotes, not {shown(path)}"
            self.reader.report("model.path", problem, "the base model: a file, a folder, or a Hub id")
            return None
        try:
            location = locate(path, self.reader.base)
            found = self._detected_family(location, family)
        except LorakitError as error:
            self.reader.report("model.path", str(error))
            return None
        table["path"] = str(location)
        return self._component(ModelFamilyConfig, {**table, "name": found}, "model", None)

    def _detected_family(self, location: Any, asked: Any) -> Any:
        summary = summarize(location)
        detected = self.catalog.detect_model_family(summary)
        if asked is None and detected is None:
            raise PluginError(f"{location} is {describe(summary)}; no installed plugin trains it")
        if asked is not None and detected is not None and asked != detected:
            raise PluginError(f"{location} is {describe(summary)}, of the family {detected!r}, not {asked!r}")
        return detected if asked is None else asked

    def _observers(self, tables: Any) -> tuple[ObserverConfig, ...]:
        if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
            self.reader.report("observers", f"must be a list of tables, [[observers]], not {shown(tables)}")
            return ()
        found = [
            self._component(ObserverConfig, dict(table), f"observers[{index}]", None)
            for index, table in enumerate(tables)
        ]
        return tuple(observer for observer in found if observer)


def _overridden(tables: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tables with each `a.b.c=value` set; a value that is not TOML is taken as text."""
    for override in overrides:
        key, separator, text = override.partition("=")
        names = key.strip().split(".")
        if not separator or not all(names):
            raise ConfigError([Problem("--set", f"must be KEY=VALUE, not {override!r}", "--set optimizer.lr=1e-4")])
        target: Any = tables
        for name in names[:-1]:
            target = _entered(target, name, key)
        index = _index(target, names[-1])
        if not isinstance(target, dict) and index is None:
            raise ConfigError([Problem("--set", f"{key} does not lead to a key")])
        target[names[-1] if index is None else index] = _toml_value(text.strip())
    return tables


def _entered(target: Any, name: str, key: str) -> Any:
    index = _index(target, name)
    if index is not None:
        return target[index]
    if not isinstance(target, dict):
        raise ConfigError([Problem("--set", f"{key} does not lead to a key")])
    return target.setdefault(name, {})


def _index(target: Any, name: str) -> int | None:
    return int(name) if isinstance(target, list) and name.isdigit() and int(name) < len(target) else None


def _toml_value(text: str) -> Any:
    try:
        return tomlkit.parse(f"value = {text}").unwrap()["value"]
    except (TOMLKitError, KeyError):
        return text


def with_default_observers(config: TrainConfig, catalog: Catalog) -> TrainConfig:
    """The config with the observers that every run has, unless it names them itself."""
    named = {observer.name for observer in config.observers}
    missing = [catalog.find(ObserverConfig, name) for name in ("progress",) if name not in named]
    return evolve(config, observers=(*config.observers, *(observer() for observer in missing)))
