"""Small real runs: a tiny Stable Diffusion, a few photographs, and configs that tests change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.plugins.catalog import Catalog

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """What is installed."""
    return Catalog.discover()


@pytest.fixture
def tables(
    tiny_sd1: Path, photographs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The tables of a short run; all tests of a session share one cache."""
    return {
        "model": {"path": str(tiny_sd1)},
        "data": {
            "image_dir": str(photographs),
            "resolution": 64,
            "cache_dir": str(tmp_path_factory.getbasetemp() / "cache"),
        },
        "network": {"rank": 4, "alpha": 4.0},
        "optimizer": {"lr": 1e-3},
        "training": {"max_steps": 6, "device": "cpu"},
        "output": {"dir": str(tmp_path / "out"), "name": "test"},
    }


@pytest.fixture
def make_config(tables: dict[str, Any], tmp_path: Path, catalog: Catalog) -> MakeConfig:
    """A function from changed sections to a config: `make_config(training={"max_steps": 2})`."""

    def make(**sections: Any) -> TrainConfig:
        merged = {key: dict(value) for key, value in tables.items()}
        for name, changes in sections.items():
            merged[name] = {**merged.get(name, {}), **changes} if isinstance(changes, Mapping) else changes
        return config_from_tables(merged, tmp_path, catalog)

    return make
