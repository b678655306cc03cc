"""Runs with the components of the example."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import lorakit
from lorakit.api import ConfigError


def test_a_run_with_all_of_them(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """A run trains only the attention layers, with RAdam, and writes the loss of every second step."""
    train_tables["network"] = {"name": "attention_only", "rank": 2}
    train_tables["optimizer"] = {"name": "radam", "lr": 1e-3}
    train_tables["observers"] = [{"name": "loss_curve", "every_n_steps": 2}]
    path = lorakit.train(train_tables)
    layers = {key.partition(".")[0] for key in load_file(path)}
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in layers
    assert "lora_te_text_model_encoder_layers_0_self_attn_out_proj" in layers
    assert all("_attn" in layer for layer in layers)
    with (tmp_path / "out" / "lora-loss.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["step"] for line in lines] == ["2", "4"]
    assert all(0 < float(line["loss"]) < 10 for line in lines)


def test_values_are_checked(train_tables: dict[str, Any]) -> None:
    """A value out of range is reported with its key before anything is trained."""
    train_tables["observers"] = [{"name": "loss_curve", "every_n_steps": 0}]
    with pytest.raises(ConfigError, match=r"observers\[0\]\.every_n_steps: must be at least 1, not 0"):
        lorakit.check(train_tables)
