"""Reading a config file and its `--set` overrides: every problem at once, before anything heavy is imported."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs

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
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.sampling import TimestepSamplerConfig
from lorakit.checkpoints import LORA_FILES, locate, summarize
from lorakit.config.dataset_tables import DATASET_KEYS, SECTION_KEYS, SUBSET_KEYS, read_data_section
from lorakit.config.datasets import DataSection, DatasetConfig, SubsetConfig
from lorakit.config.metadata import MetadataSection
from lorakit.config.table_reader import TableReader, field_names, hint_for
from lorakit.config.toml_files import read_toml
from lorakit.config.train_config import OutputSection, TrainConfig, TrainingSection
from lorakit.config.values import TypedInteger, TypedNumber, lost_backslash, toml_repr
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

PLAIN_SECTIONS: Mapping[str, type] = {"training": TrainingSection, "output": OutputSection, "metadata": MetadataSection}
"""Sections that are the same whatever is installed."""

KINDS: Mapping[str, type[Component]] = {
    "model": ModelFamilyConfig,
    "observers": ObserverConfig,
    **{section: base for section, (base, _) in COMPONENT_SECTIONS.items()},
}
"""The kind of component in each section that has one."""

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
    tables = _apply_overrides(tables, overrides, known_keys(catalog)) if overrides else tables
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


class _ConfigLoader:
    """Reads the sections one by one, so that a problem in one does not hide those in the next."""

    def __init__(self, reader: TableReader, catalog: Catalog) -> None:
        self.reader = reader
        self.catalog = catalog

    def read(self, tables: Mapping[str, Any]) -> TrainConfig | None:
        reader = self.reader
        reader.report_unknown_keys(tables, SECTIONS, "")
        sections: dict[str, Any] = {"model": self._model(reader.table(tables, "model"))}
        defaults = sections["model"].dataset_defaults if sections["model"] else {}
        sections["data"] = read_data_section(reader, reader.table(tables, "data"), defaults)
        for section, (base, default) in COMPONENT_SECTIONS.items():
            is_model_s = section == "timesteps" and sections["model"]
            absent = sections["model"].noise_process.timestep_sampler if is_model_s else default
            table = reader.table(tables, section)
            if section == "loss" and sections["model"]:
                table = {**sections["model"].loss_defaults, **table}
            sections[section] = self._component(base, table, section, absent)
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
        report = self.reader.report
        asked, path = table.pop("family", None), table.get("path")
        if asked is not None and not isinstance(asked, str):
            report("model.family", f"must be a text in quotes, not {toml_repr(asked)}")
            asked = None
        detected, title = None, ""
        if not isinstance(path, str) or not path:
            problem = "is missing" if path in (None, "") else f"must be a text in quotes, not {toml_repr(path)}"
            report("model.path", problem, "the base model: a file, a folder, or a Hub id")
        else:
            try:
                location = locate(path, self.reader.base)
                detected = self.catalog.detect_model_family(summarize(location))
                title = f"{location} is {detected.title}"
            # RuntimeError: `~name` of an unknown user; OSError: a name that is too long, or a folder that is not ours.
            except (LorakitError, OSError, RuntimeError) as error:
                report("model.path", lost_backslash(path) or str(error))
        family = asked or (detected.name if detected else None)
        component = self.reader.component(ModelFamilyConfig, family, "model.family") if family else None
        if component is None:
            self.reader.report_unknown_keys(table, _keys_of_kind(self.catalog, ModelFamilyConfig), "model")
            if detected and not family:
                broken = "some plugins are broken; see `lorakit plugins`" if self.catalog.broken else ""
                report("model.path", f"{title}; no installed plugin trains it", detected.advice or broken)
            return None
        if detected is None:
            self.reader.report_unknown_keys(table, field_names(component), "model")
            self.reader.values(component, table, "model", given=["path"])
            return None
        if detected.name not in (None, component.name):
            report("model.family", f"must be {detected.name!r}, not {asked!r}: {title}")
        return self.reader.structure(component, {**table, "path": str(location)}, "model")

    def _observers(self, tables: Any) -> tuple[ObserverConfig, ...]:
        if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
            self.reader.report("observers", f"must be a list of tables, [[observers]], not {toml_repr(tables)}")
            return ()
        found = [
            self._component(ObserverConfig, dict(table), f"observers[{index}]", None)
            for index, table in enumerate(tables)
        ]
        return tuple(observer for observer in found if observer)


def _problems_on_disk(sections: Mapping[str, Any]) -> Iterable[Problem]:
    """Files that should be there and are not, and folders that cannot be written to."""
    network, output, data = sections["network"], sections["output"], sections["data"]
    if network and network.weights and not os.path.isfile(network.weights):  # noqa: PTH113 - raises nothing
        # What PEFT and diffusers call LoRA files, of which people know the folder.
        inside = [network.weights / file for file in LORA_FILES if os.path.isfile(network.weights / file)]  # noqa: PTH113
        hint = f"give the file in it, {inside[0]}" if inside else "the LoRA file to start from"
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


def known_keys(catalog: Catalog) -> dict[str, object]:
    """All keys that a config can have, by their paths (`network.rank`, `data.config`), with their defaults."""
    classes: dict[str, Sequence[type]] = {"data": (DataSection, DatasetConfig, SubsetConfig)}
    classes |= {section: (cls,) for section, cls in PLAIN_SECTIONS.items()}
    for section, base in KINDS.items():
        classes[section] = [found.component for named in catalog.of_kind(base).values() for found in named]
    keys: dict[str, object] = {"data.config": attrs.NOTHING, "data.general": attrs.NOTHING}
    for section, found in classes.items():
        if section in KINDS:
            default = COMPONENT_SECTIONS[section][1] if section in COMPONENT_SECTIONS else attrs.NOTHING
            keys[f"{section}.{KINDS[section].name_key}"] = default
        fields = (field for cls in found for field in attrs.fields(cls) if field.init)
        keys |= {f"{section}.{field.name}": field.default for field in fields}
    del keys["data.subsets"]
    return keys


def _key_locations(catalog: Catalog) -> dict[str, str]:
    """Where each option stands, by its bare name, for hints; the first section that has it wins."""
    places = {key: f"data.{key}" for key in (*SECTION_KEYS, *DATASET_KEYS, *SUBSET_KEYS)}
    for section, cls in PLAIN_SECTIONS.items():
        for key in field_names(cls):
            places.setdefault(key, f"{section}.{key}")
    for section, base in KINDS.items():
        for key, owners in _keys_of_kind(catalog, base).items() if base is not ObserverConfig else ():
            is_shared = len(owners) == len(catalog.of_kind(base))
            few = owners if len(owners) < 4 else [f"{owners[0]}, {owners[1]}", f"{len(owners) - 2} others"]
            places.setdefault(key, f"{section}.{key}" + ("" if is_shared else f" of {' or '.join(few)}"))
    del places["name"]  # too general to say what was meant
    return places


PRECEDENCE: Mapping[str, tuple[str, ...]] = {
    "max_steps": ("max_epochs",),
    "save_every_n_epochs": ("save_n_epoch_ratio",),
    "every_n_steps": ("every_n_epochs",),
    "rank": ("rank_from_weights",),
    "alpha": ("rank_from_weights",),
    "conv_rank": ("rank_from_weights",),
    "conv_alpha": ("rank_from_weights",),
}
"""Keys that have no effect beside another of the same table, with those others. Where one of the first is typed, the
others of the file do not count."""


def _apply_overrides(tables: dict[str, Any], overrides: Sequence[str], keys: Collection[str]) -> dict[str, Any]:
    """The tables with each `a.b[0].c=value` set; a value that is not TOML is taken as text, and `none` unsets a key.

    `keys` are all that a config can have. Raises ConfigError with everything that is wrong with the overrides.
    """
    problems: list[Problem] = []
    typed = [re.sub(r"\[(\d+)\]", r".\1", text.partition("=")[0].strip()).split(".") for text in overrides]
    for override, names in zip(overrides, typed, strict=True):
        key, separator, text = (part.strip() for part in override.partition("="))
        if not separator or not all(names):
            hint = "--set optimizer.lr=1e-4, without spaces around ="
            problems.append(Problem("--set", f"must be KEY=VALUE, not {override!r}", hint))
            continue
        try:
            table: Any = tables
            for name in names[:-1]:
                table = table[int(name)] if isinstance(table, list) else table.setdefault(name, {})
            last: Any = int(names[-1]) if isinstance(table, list) else names[-1]
            if text.lower() in ("none", "null"):
                problems += _unset(table, last, key, keys)
                continue
            for other in PRECEDENCE.get(names[-1], ()) if isinstance(table, dict) else ():
                if [*names[:-1], other] not in typed:
                    table.pop(other, None)
            table[last] = parse_value(text)
        # A number that counts too far, a word where a list wants a number, a key inside what is no table.
        except (IndexError, ValueError, TypeError, AttributeError):
            problems.append(Problem("--set", f"{key} is not the path of a key", "list entries are counted from 0"))
    if problems:
        raise ConfigError(problems)
    return tables


def _unset(table: Any, last: Any, key: str, keys: Collection[str]) -> list[Problem]:
    """Remove a key; a problem if no config could have it, as it may be misspelt."""
    if isinstance(table, list) or last in table:
        del table[last]
        return []
    bare = re.sub(r"\[\d+\]", "", key)
    section, _, name = bare.rpartition(".")
    known = [own.removeprefix(f"{section}.") for own in keys if own.startswith(f"{section}.")]
    sections = {own.partition(".")[0] for own in keys}
    # Deeper than a section, as in data.datasets[0], or below a table of any keys.
    if bare in keys or bare in sections or bare.count(".") > 1:
        return []
    hint = hint_for(section, name, known or sorted(sections), {})
    return [Problem(key, "is not a known key", hint)]


def parse_value(text: str) -> Any:
    """The TOML value of a text; the text itself if it is not TOML, or a date, which no key takes."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        # Shells take the quotation marks out of ["unet", "text_encoder"].
        words = re.fullmatch(r"\[\s*([\w./-]+(?:\s*,\s*[\w./-]+)*)\s*,?\s*\]", text)
        return [parse_value(word.strip()) for word in words[1].split(",")] if words else text
    value = found["value"]
    if found.keys() != {"value"}:
        return text
    if type(value) in (int, float):
        typed: TypedInteger | TypedNumber = TypedInteger(value) if isinstance(value, int) else TypedNumber(value)
        typed.text = text
        return typed
    return value if isinstance(value, str | bool | list | dict) else text
