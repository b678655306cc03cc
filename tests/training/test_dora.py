"""Whole runs with DoRA."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorakit.plugins.catalog import Catalog
from lorakit.training.prepare import prepare
from lorakit.training.setup import run_training

DORA = {"dora": True, "module_dropout": 0.2, "dropout": 0.1, "alpha": 2.0}


def same(left: Path, right: dict[str, torch.Tensor]) -> bool:
    """Whether a file has these tensors, bit for bit."""
    tensors = load_file(left)
    return tensors.keys() == right.keys() and all(torch.equal(tensor, right[key]) for key, tensor in tensors.items())


def test_runs(make_config, catalog: Catalog, tmp_path: Path) -> None:
    """Magnitudes are trained and saved; resumed, or recomputed in the backward pass, a run ends the same."""

    def config(**sections: dict):
        return make_config(network=DORA, **sections)

    whole = run_training(prepare(config(training={"max_steps": 4})), catalog)
    expected = load_file(whole)
    with safe_open(whole, "pt") as stream:
        assert '"dora_wd": "True"' in stream.metadata()["ss_network_args"]
    magnitudes = {key for key in expected if key.endswith(".dora_scale")}
    fresh = load_file(run_training(prepare(config(optimizer={"lr": 1e-9}, training={"max_steps": 1})), catalog))
    assert len(magnitudes) == len(expected) / 4
    assert sum(not torch.allclose(expected[key], fresh[key], rtol=1e-4) for key in magnitudes) > len(magnitudes) / 2
    run_training(prepare(config(training={"max_steps": 2}, output={"save_state": True})), catalog)
    assert same(run_training(prepare(config(training={"max_steps": 4})), catalog, resume="latest"), expected)
    recomputing = config(training={"max_steps": 4, "gradient_checkpointing": True})
    assert same(run_training(prepare(recomputing), catalog), expected)


def test_continues_from_a_file_in_bfloat16(make_config, catalog: Catalog, tmp_path: Path) -> None:
    """A run in bfloat16 takes up the magnitudes of a file, and moves them."""
    first = run_training(prepare(make_config(network=DORA, training={"max_steps": 2})), catalog)
    start = load_file(first.rename(tmp_path / "start.safetensors"))
    network = {**DORA, "weights": str(tmp_path / "start.safetensors")}
    training = {"max_steps": 2, "mixed_precision": "bf16"}
    for rate, moved in ((1e-12, False), (1e-3, True)):
        config = make_config(network=network, training=training, optimizer={"lr": rate})
        tensors = load_file(run_training(prepare(config), catalog))
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        close = all(torch.allclose(tensor, start[key], rtol=1e-5, atol=1e-7) for key, tensor in tensors.items())
        assert close != moved
