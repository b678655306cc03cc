"""Adapters of layers that the model does not read are in files, and are not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorakit
from lorakit.errors import AdapterError
from lorakit.testing.runs import StartedRun, start_run

BEHIND = "lora_te_text_model_encoder_layers_{}_"
NETWORKS: dict[str, dict[str, Any]] = {
    "lierla": {"name": "lierla"},
    "dora": {"name": "c3lier", "dora": True},
    "with dropout": {"name": "lierla", "dropout": 0.1},
    "loha": {"name": "loha"},
    "lokr": {"name": "lokr", "factor": 4},
}
ADAMW: dict[str, Any] = {"name": "adamw", "weight_decay": 0.5}
"""Takes all parameters of a group as one."""
ADAFACTOR: dict[str, Any] = {
    "name": "adafactor", "relative_step": False, "scale_parameter": False, "weight_decay": 0.5,
}  # fmt: skip
"""Takes them one by one."""


def trained(run: StartedRun) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a file holds before and after training."""
    before = run.network.export_state()
    run.finish()
    return before, run.network.export_state()


@pytest.mark.parametrize(("network", "optimizer"), [*((name, ADAMW) for name in NETWORKS), ("dora", ADAFACTOR)])
def test_they_stay_as_they_are(make_config, tmp_path: Path, network: str, optimizer: dict[str, Any]) -> None:
    """With `clip_skip = 2`, the last layer's adapters are in the file and do not decay; all others do."""
    options = {"parts": ["text_encoder"], **NETWORKS[network], "weights": str(tmp_path / "start.safetensors")}
    parts = {key: value for key, value in options.items() if key != "weights"}
    plain = start_run(make_config(network=parts, training={"max_steps": 1})).network
    generator = torch.Generator().manual_seed(0)
    start = {
        key: own if key.endswith("alpha") else own + 0.1 * torch.rand(own.shape, generator=generator)
        for key, own in plain.export_state().items()
    }
    save_file(start, tmp_path / "start.safetensors")
    numbers = {int(key.split("_layers_")[1].partition("_")[0]) for key in start}
    steps = {"max_steps": 2, "mixed_precision": "bf16"}
    settings = {"network": options, "training": steps, "optimizer": {"lr": 1e-2, **optimizer}}
    before, after = trained(start_run(make_config(model={"clip_skip": 2}, **settings)))
    assert before.keys() == after.keys() == start.keys()
    for key, own in before.items():
        is_read = not key.startswith(BEHIND.format(max(numbers)))
        assert torch.equal(own, after[key]) is (not is_read or key.endswith("alpha")), key


def test_no_adapter_is_read(make_config, tiny_sd1: Path, tmp_path: Path) -> None:
    """A file with such adapters alone is nothing to train."""
    layers = json.loads((tiny_sd1 / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    key = f"{BEHIND.format(layers - 1)}self_attn_q_proj"
    factors = {f"{key}.lora_down.weight": torch.ones(4, 32), f"{key}.lora_up.weight": torch.ones(32, 4)}
    save_file(factors, tmp_path / "start.safetensors")
    network = {"parts": ["text_encoder"], "weights": "start.safetensors", "rank_from_weights": True}
    config = make_config(model={"clip_skip": 2}, network=network, data={"cache_dir": str(tmp_path / "cache")})
    with pytest.raises(AdapterError, match=r"adapts only layers that the model does not read.*model\.clip_skip"):
        lorakit.train(config)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
