"""What every component must do, whatever its kind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomlkit

from lorakit.api.components import (
    AttentionConfig,
    Component,
    LRSchedulerConfig,
    NetworkConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
    with_import_path,
)
from lorakit.api.dataset_source import DatasetSourceConfig
from lorakit.api.loss import LossConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.sampling import TimestepSamplerConfig
from lorakit.config.dump import to_toml
from lorakit.config.field_docs import field_docs
from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.discovery import REGISTRATION_HOOKS

HEAVY = ("torch", "diffusers", "transformers", "accelerate")
"""Packages that no component's module may import before something is built."""

SECTIONS: Mapping[type[Component], str] = {
    ModelFamilyConfig: "model",
    NetworkConfig: "network",
    OptimizerConfig: "optimizer",
    LRSchedulerConfig: "lr_scheduler",
    AttentionConfig: "attention",
    SaverConfig: "saver",
    LossConfig: "loss",
    TimestepSamplerConfig: "timesteps",
    ObserverConfig: "observers",
    DatasetSourceConfig: "data",
}
"""The section of a config file that picks a component of each kind, where one does."""


class ComponentContract:
    """What every component must do; the suite of its kind, such as `OptimizerContract`, includes these tests.

    Each test runs in its own empty folder, which relative paths in `config` are relative to, and
    torch computes on one thread, which is fastest for tiny models.
    """

    config: Component
    """The component to test, with the settings to test it with."""
    files: Mapping[str, str] = {}
    """Files that the settings name, relative to the folder, with their texts."""

    @pytest.fixture(autouse=True)
    def _in_a_folder_of_its_own(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        lorakit_one_thread: None,  # noqa: ARG002
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name, text in self.files.items():
            Path(name).write_text(text, encoding="utf-8")
        paths = {name: value for name, value in _values(self.config).items() if isinstance(value, Path)}
        self.config = attrs.evolve(self.config, **{name: path.absolute() for name, path in paths.items()})

    def test_is_frozen(self) -> None:
        """Settings cannot be changed once they are read."""
        assert "__attrs_attrs__" in vars(type(self.config)), "put @frozen(kw_only=True) above the class"
        for name, value in {**_values(self.config), "anything": 1}.items():
            with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
                setattr(self.config, name, value)

    def test_is_documented(self) -> None:
        """The class and each of its fields say what they are, for `lorakit init` and the messages about the config."""
        component: type = type(self.config)
        documented = {name for name, text in field_docs(component).items() if text}
        assert (component.__doc__ or "").strip(), f"{component.__name__} needs a docstring"
        assert component.__doc__ not in {base.__doc__ for base in component.__mro__[1:]}, "the docstring is inherited"
        assert not _values(self.config).keys() - documented, "put a string under each field"

    def test_has_a_plain_name(self) -> None:
        """The name can be written without thinking: lower-case letters, digits, - and _; or it is a dotted path."""
        assert re.fullmatch(r"[\w.]+" if self.config.takes_import_path else r"[a-z0-9_-]+", self.config.name)

    def test_registered(self) -> None:
        """The component is found under its name, as `lorakit plugins` shows."""
        catalog = Catalog.discover()
        known = [found.component for same in catalog.of_kind(self._base).values() for found in same]
        found = [with_import_path(component, self.config.name) for component in known]
        assert type(self.config) in found, f"no entry point registers it; broken plugins: {catalog.broken}"

    def test_imports_nothing_heavy(self) -> None:
        """Importing the component's module is quick: torch and optional packages wait until something is built."""
        heavy = [*HEAVY, *self.config.requires]
        program = "import importlib, json, sys; importlib.import_module(sys.argv[1]); print(json.dumps([*sys.modules]))"
        command = [sys.executable, "-c", program, type(self.config).__module__]
        imported = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603
        assert not set(heavy) & set(imported)

    def test_reads_back_from_a_config_file(self, train_tables: dict[str, Any], tmp_path: Path) -> None:
        """The config that a run writes beside its result reads back as an equal one, so the run can be repeated."""
        config = self.train_config(train_tables, tmp_path)
        again = config_from_tables(tomlkit.parse(to_toml(config)).unwrap(), tmp_path)
        assert again == config

    def train_config(self, tables: dict[str, Any], base: Path) -> TrainConfig:
        """The config of a run with this component in the place of the tables' own."""
        section = SECTIONS[self._base]
        chosen: dict[str, Any] = {section: (self.config,) if section == "observers" else self.config}
        return attrs.evolve(config_from_tables(tables, base), **chosen)

    @property
    def _base(self) -> type[Component]:
        return next(base for base in REGISTRATION_HOOKS.values() if isinstance(self.config, base))


def _values(config: Component) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in attrs.fields(type(config))}
