"""Every flow-matching family with every network, precision and memory setting; and resumed, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.noise import FlowSpec
from lorakit.config.train_config import TrainConfig
from lorakit.plugins.catalog import Catalog
from lorakit.training.checkpoint.state import state_folder
from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run, run_training
from tests.conftest import FLOW_MAKERS
from tests.training.test_learning import first_batch, loss_on, train_on

NETWORKS: Mapping[str, dict[str, Any]] = {
    "lierla": {"name": "lierla"},
    "dora": {"name": "lierla", "dora": True},
    "loha": {"name": "loha"},
    "lokr": {"name": "lokr", "factor": 4},
}
SETTINGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "plain": ("no", {}),
    "bf16": ("bf16", {}),
    "int8": ("bf16", {"int8_base": ["transformer"]}),
    "fp8": ("bf16", {"fp8_base": ["transformer"]}),
    "nf4, checkpoints": ("no", {"nf4_base": ["transformer"], "gradient_checkpointing": True}),
    "streamed": ("no", {"stream_base": ["transformer"]}),
    "int8, streamed, checkpoints": (
        "bf16", {"int8_base": ["transformer"], "stream_base": ["transformer"], "gradient_checkpointing": True},
    ),
}  # fmt: skip
"""Precision, and keys of `[training]`."""


def config_of(make_config: Any, path: Path, **sections: Any) -> TrainConfig:
    """The config of a run on a model."""
    config: TrainConfig = make_config(model={"path": str(path)}, **sections)
    return config


def test_every_family_is_here(catalog: Catalog) -> None:
    """The table above names all families of lorakit's own that learn a velocity."""
    found = {
        name
        for name, (first, *_) in catalog.of_kind(ModelFamilyConfig).items()
        if first.provider.is_of("lorakit") and isinstance(first.component(path="gone").noise_process, FlowSpec)
    }
    assert found == FLOW_MAKERS.keys()


OTHERS = [name for name in SETTINGS if name not in ("plain", "int8")]
CASES = [*product(NETWORKS, ("plain", "int8")), *product(("lierla",), OTHERS), ("lokr", "streamed")]
"""Networks with settings: each network in both precisions, on whole and quantized layers; each setting with a LoRA."""


@pytest.mark.parametrize(("network", "setting"), CASES)
@pytest.mark.parametrize("family", FLOW_MAKERS)
def test_loss_falls(
    make_config: Any, tiny_flow: Callable[[str], Path], family: str, network: str, setting: str
) -> None:
    """Updates on one batch lower its loss; all layers that the family adapts by default take part."""
    precision, training = SETTINGS[setting]
    config = config_of(
        make_config,
        tiny_flow(family),
        network={"rank": 4, "alpha": 4.0, **NETWORKS[network]},
        optimizer={"lr": 1e-2},
        training={"mixed_precision": precision, **training},
        data={"batch_size": 2},
    )
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    batch = first_batch(run)
    before = loss_on(run, batch).item()
    for _ in range(8):
        train_on(run, loss_on(run, batch))
    assert loss_on(run, batch).item() < 0.99 * before


@pytest.mark.parametrize("family", FLOW_MAKERS)
def test_resumes_to_the_same_bytes(
    make_config: Any, tiny_flow: Callable[[str], Path], catalog: Catalog, family: str
) -> None:
    """A run of all parts that is resumed half-way ends with the file of one that was not."""
    path = tiny_flow(family)
    parts = [part.name for part in catalog.find(ModelFamilyConfig, family).parts]
    config = config_of(
        make_config,
        path,
        network={"rank": 2, "parts": parts, "module_dropout": 0.2},
        data={"batch_size": 2, "shuffle_caption": True, "caption_dropout_rate": 0.3},
        training={"max_steps": 4},
        output={"save_every_n_steps": 2, "save_state": True, "keep_last_states": 2},
        saver={"name": "safetensors", "precision": "fp32"},
    )
    whole = load_file(run_training(prepare(config), catalog))
    state = min(folder for folder in state_folder(config).iterdir() if folder.is_dir())
    resumed = load_file(run_training(prepare(config), catalog, resume=state))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name or "lora_up" in name)
