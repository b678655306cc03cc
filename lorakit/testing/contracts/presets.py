"""What every preset must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomlkit

from lorakit.api.preset import PresetConfig
from lorakit.cli.init import plan_start, short_config
from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.plugins.build import build_component
from lorakit.plugins.catalog import Catalog
from lorakit.testing.contracts.component import ComponentContract


class PresetContract(ComponentContract):
    """What every preset must do.

    class TestLogo(PresetContract):
        config = LogoPreset()
    """

    config: PresetConfig

    def test_its_words_are_in_a_prompt(self) -> None:
        """Some preview shows what is learnt."""
        preset = build_component(self.config)
        assert any("{}" in prompt for prompt in preset.prompts)

    def test_init_writes_it(self) -> None:
        """`lorakit init --for NAME` writes a config with its settings, which lorakit reads without a problem."""
        preset, tables = build_component(self.config), self.written()
        assert (tables["network"]["rank"], tables["network"]["alpha"]) == (preset.rank, preset.alpha)
        data, training = tables["data"], tables["training"]
        steps = 20 * data["num_repeats"] * training["max_epochs"]
        assert 0.5 * preset.steps <= steps <= 1.5 * preset.steps

    def written(self) -> dict[str, Any]:
        """The tables of the config that `lorakit init` writes for it."""
        start = plan_start(Catalog.discover(), self.config.name, None, None, "adamw")
        Path("prompts.txt").write_text(start.prompts(), encoding="utf-8")
        return tomlkit.parse(short_config(start, Path("config.toml").absolute())).unwrap()

    def train_config(self, tables: dict[str, Any], base: Path) -> TrainConfig:
        """The config that `lorakit init` writes, for the model and the images of the tables."""
        own = {**self.written(), "model": tables["model"]}
        own["data"] |= {
            "image_dir": tables["data"]["image_dir"],
            "resolution": tables["data"]["resolution"],
            "enable_bucket": False,
        }
        return config_from_tables(own, base)
