"""Reading a config file: every problem at once, before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attrs import frozen

from lorakit.api.components import (
    AttentionConfig,
    Component,
    LRSchedulerConfig,
    NetworkConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
)
from lorakit.api.loss import LossConfig
from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.api.sampling import TimestepSamplerConfig
from lorakit.checkpoints import Location, locate, summarize
from lorakit.config.dataset_tables import DATASET_KEYS, SECTION_KEYS, SUBSET_KEYS, read_data_section
from lorakit.config.metadata import MetadataSection
from lorakit.config.overrides import apply_overrides
from lorakit.config.table_reader import TableReader, field_names
from lorakit.config.toml_files import read_toml
from lorakit.config.train_config import OutputSection, TrainConfig, TrainingSection
from lorakit.config.values import lost_backslash, toml_repr
from lorakit.errors import ConfigError, LorakitError, Problem
from lorakit.plugins.catalog import Catalog
from lorakit.utils.atomic_io import unwritable_reason

COMPONENT_SECTIONS: Mapping[str, tuple[type[Component], str]] = {
    "network": (NetworkConfig, "lierla"),
    "optimizer": (OptimizerConfig, "adamw"),
    "lr_scheduler": (LRSchedulerConfig, "constant"),
    "attention": (AttentionConfig, "sdpa"),
    "saver": (SaverConfig, "safetensors"),
    "loss": (LossConfig, "l2"),
    "timesteps": (TimestepSamplerConfig, "uniform"),
}
"""Sections that pick a component by name, with its kind and its name when absent; models may have another timestep
sampler."""

PLAIN_SECTIONS: Mapping[str, type] = {
    "training": TrainingSection,
    "output": OutputSection,
    "metadata": MetadataSection,
}
"""Sections that are the same whatever is installed."""

SECTIONS = ("model", "data", *COMPONENT_SECTIONS, *PLAIN_SECTIONS, "observers")

ComponentT = TypeVar("ComponentT", bound=Component)


def read_config(path: Path, overrides: Sequence[str] = (), catalog: Catalog | None = None) -> TrainConfig:
    """The config in a TOML file, with `section.key=value` overrides applied.

    Raises ConfigError with every problem found.
    """
    try:
        tables = read_toml(path)
    except ValueError as error:
        raise ConfigError([Problem(str(path), str(error))]) from error
    _refuse_other_configs(path, tables)
    catalog = catalog or Catalog.discover()
    tables = apply_overrides(tables, overrides, known_keys(catalog)) if overrides else tables
    try:
        return config_from_tables(tables, path.absolute().parent, catalog)
    except ConfigError as error:
        raise ConfigError(error.problems, file=str(path)) from error


def _refuse_other_configs(path: Path, tables: Mapping[str, Any]) -> None:
    """Raise ConfigError for the config of another tool, and for a dataset file."""
    if tables.keys() & set(SECTIONS):
        return
    options = tables.keys() | {key for table in tables.values() if isinstance(table, Mapping) for key in table}
    if options & {"pretrained_model_name_or_path", "network_module", "train_data_dir", "output_name"}:
        hint = f"lorakit from-kohya --config_file {path} converts it"
        raise ConfigError([Problem(str(path), "is a file of sd-scripts options, not a config", hint)])
    if "datasets" in tables:
        hint = f'use it in a config: [data] with config = "{path.name}"'
        raise ConfigError([Problem(str(path), "is a dataset file, not a config", hint)])


def config_from_tables(tables: Mapping[str, Any], base: Path, catalog: Catalog | None = None) -> TrainConfig:
    """The config in tables as a TOML file holds them; relative paths are relative to `base`.

    Raises ConfigError with every problem found.
    """
    catalog = catalog or Catalog.discover()
    reader = TableReader(base, places=_key_locations(catalog), catalog=catalog)
    config = _ConfigLoader(reader, catalog).read(tables)
    if reader.problems or config is None:
        # A value that several subsets inherit is wrong once.
        raise ConfigError(dict.fromkeys(reader.problems))
    return config


@frozen
class _Found:
    """A base model that exists, and what plugins recognise it as."""

    location: Location
    detected: DetectedFamily

    def __str__(self) -> str:
        return f"{self.location} is {self.detected.title}"


class _ConfigLoader:
    """Reads the sections one by one, so that a problem in one does not hide those in the next."""

    def __init__(self, reader: TableReader, catalog: Catalog) -> None:
        self.reader = reader
        self.catalog = catalog

    def read(self, tables: Mapping[str, Any]) -> TrainConfig | None:
        reader = self.reader
        reader.report_unknown_keys(tables, SECTIONS, "")
        sections: dict[str, Any] = {"model": self._model(reader.table(tables, "model"))}
        sections["data"] = read_data_section(reader, reader.table(tables, "data"))
        for section, (base, default) in COMPONENT_SECTIONS.items():
            is_model_s = section == "timesteps" and sections["model"]
            absent = sections["model"].noise_process.timestep_sampler if is_model_s else default
            sections[section] = self._component(base, reader.table(tables, section), section, absent)
        for section, cls in PLAIN_SECTIONS.items():
            sections[section] = reader.structure(cls, reader.table(tables, section), section)
        sections["observers"] = self._observers(tables.get("observers", []))
        reader.problems += _problems_on_disk(sections)
        if reader.problems:
            return None
        config = TrainConfig(**sections)
        reader.problems += config.problems()
        return config

    def _component(
        self, base: type[ComponentT], table: dict[str, Any], section: str, default: str | None
    ) -> ComponentT | None:
        key = f"{section}.{base.name_key}"
        component = self.reader.component(base, table.pop(base.name_key, default), key)
        return self.reader.structure(component, table, section) if component else None

    def _model(self, table: dict[str, Any]) -> ModelFamilyConfig | None:
        asked = table.pop("family", None)
        if asked is not None and not isinstance(asked, str):
            self.reader.report("model.family", f"must be a text in quotes, not {toml_repr(asked)}")
            asked = None
        found = self._base_model(table.get("path"))
        family = asked or (found.detected.name if found else None)
        component = self.reader.component(ModelFamilyConfig, family, "model.family") if family else None
        if component is None:
            self.reader.report_unknown_keys(table, _keys_of_kind(self.catalog, ModelFamilyConfig), "model")
            if found and not family:
                broken = "some plugins are broken; see `lorakit plugins`" if self.catalog.broken else ""
                hint = found.detected.advice or broken
                self.reader.report("model.path", f"{found}; no installed plugin trains it", hint)
            return None
        if found is None:
            self.reader.report_unknown_keys(table, field_names(component), "model")
            self.reader.values(component, table, "model", given=["path"])
            return None
        if found.detected.name not in (None, component.name):
            self.reader.report("model.family", f"must be {found.detected.name!r}, not {asked!r}: {found}")
        return self.reader.structure(component, {**table, "path": str(found.location)}, "model")

    def _base_model(self, path: object) -> _Found | None:
        """The base model, or None if there is none to train on (which is reported)."""
        if not isinstance(path, str) or not path:
            problem = "is missing" if path is None else f"must be a text in quotes, not {toml_repr(path)}"
            self.reader.report("model.path", problem, "the base model: a file, a folder, or a Hub id")
            return None
        try:
            location = locate(path, self.reader.base)
            summary = summarize(location)
        # RuntimeError: `~name` of an unknown user; OSError: a name that is too long, or a folder that is not ours.
        except (LorakitError, OSError, RuntimeError) as error:
            self.reader.report("model.path", lost_backslash(path) or str(error))
            return None
        return _Found(location, self.catalog.detect_model_family(summary))

    def _observers(self, tables: Any) -> tuple[ObserverConfig, ...]:
        if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
            self.reader.report("observers", f"must be a list of tables, [[observers]], not {toml_repr(tables)}")
            return ()
        found = [
            self._component(ObserverConfig, dict(table), f"observers[{index}]", None)
            for index, table in enumerate(tables)
        ]
        return tuple(observer for observer in found if observer)


_ADAPTERS_IN_FOLDERS = tuple(
    name + suffix for name in ("adapter_model", "pytorch_lora_weights") for suffix in (".safetensors", ".bin")
)
"""What PEFT and diffusers call LoRA files, of which people know the folder."""


def _problems_on_disk(sections: Mapping[str, Any]) -> Iterable[Problem]:
    """Files that should be there and are not, and folders that cannot be written to."""
    network, output, data = sections["network"], sections["output"], sections["data"]
    if network and network.weights and not os.path.isfile(network.weights):  # noqa: PTH113 - raises nothing
        inside = [file for file in _ADAPTERS_IN_FOLDERS if os.path.isfile(network.weights / file)]  # noqa: PTH113
        hint = f"give the file in it, {network.weights / inside[0]}" if inside else "the LoRA file to start from"
        yield Problem("network.weights", f"{network.weights} is not a file", hint)
    folders = {"output.dir": output and output.dir, "data.cache_dir": data and data.cache_dir}
    for key, folder in folders.items():
        reason = unwritable_reason(folder) if folder else None
        if reason:
            yield Problem(key, reason, "choose another folder")


def _keys_of_kind(catalog: Catalog, base: type[Component]) -> dict[str, list[str]]:
    """All keys that components of a kind have, each with the names of those that have it."""
    owners: dict[str, list[str]] = {}
    for name, registrations in catalog.of_kind(base).items():
        for key in dict.fromkeys(key for found in registrations for key in field_names(found.component)):
            owners.setdefault(key, []).append(name)
    return owners


def known_keys(catalog: Catalog) -> list[str]:
    """All keys that a config can have, by their paths: `network.rank`, `data.config`, `observers.name`."""
    keys = [f"data.{key}" for key in (*SECTION_KEYS, *DATASET_KEYS, *SUBSET_KEYS, "config", "datasets", "general")]
    for section, cls in PLAIN_SECTIONS.items():
        keys += [f"{section}.{key}" for key in field_names(cls)]
    kinds: dict[str, type[Component]] = {"model": ModelFamilyConfig, "observers": ObserverConfig}
    kinds |= {section: base for section, (base, _) in COMPONENT_SECTIONS.items()}
    for section, base in kinds.items():
        own = _keys_of_kind(catalog, base)
        keys += [f"{section}.{key}" for key in (base.name_key, *own)]
    return keys


def _key_locations(catalog: Catalog) -> dict[str, str]:
    """Where each option stands, by its bare name, for hints; the first section that has it wins."""
    places = {key: f"data.{key}" for key in (*SECTION_KEYS, *DATASET_KEYS, *SUBSET_KEYS)}
    for section, cls in PLAIN_SECTIONS.items():
        for key in field_names(cls):
            places.setdefault(key, f"{section}.{key}")
    kinds: dict[str, type[Component]] = {"model": ModelFamilyConfig}
    kinds |= {section: base for section, (base, _) in COMPONENT_SECTIONS.items()}
    for section, base in kinds.items():
        for key, owners in _keys_of_kind(catalog, base).items():
            is_shared = len(owners) == len(catalog.of_kind(base))
            few = owners if len(owners) < 4 else [f"{owners[0]}, {owners[1]}", f"{len(owners) - 2} others"]
            places.setdefault(key, f"{section}.{key}" + ("" if is_shared else f" of {' or '.join(few)}"))
    del places["name"]  # too general to say what was meant
    return places
