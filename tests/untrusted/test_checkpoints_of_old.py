"""Runs on checkpoints as the first Stable Diffusions were published, and on files whose names lie."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.checkpoints import kind_of_file, summarize
from lorakit.models.weights.hashing import hash_of_weights
from tests.untrusted.hostile import run_command

Tables = dict[str, Any]


def as_published(tensors: dict[str, Tensor], path: Path, is_archive: bool) -> Path:
    """Write a checkpoint like v1-5-pruned.ckpt: Lightning's, with a second U-Net in `model_ema` and an optimizer."""
    package = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": package.__name__})
    package.ModelCheckpoint = callback  # type: ignore[attr-defined]
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    copies = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in unet.items()}
    content = {
        "epoch": 25, "global_step": 840_000, "pytorch-lightning_version": "1.4.2",
        "state_dict": {**tensors, **copies, "betas": torch.linspace(0, 1, 1000), "model_ema.decay": torch.tensor(0.9)},
        "callbacks": {callback: {"monitor": "val/loss", "best_model_score": np.float64(0.2), "current": callback()}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"base_lrs": [np.float32(1e-4)]}],
    }  # fmt: skip
    names = [package.__name__.rsplit(".", count)[0] for count in (2, 1, 0)]
    sys.modules.update({name: package if name == package.__name__ else types.ModuleType(name) for name in names})
    try:
        torch.save(content, path, _use_new_zipfile_serialization=is_archive)
    finally:
        for name in names:
            del sys.modules[name]
    return path


def trained(tables: Tables, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Tensor]:
    """What `lorakit check` and `lorakit train` make of a config."""
    tables["output"]["dir"] = str(folder / "out")
    config = folder / "config.toml"
    config.write_text(tomlkit.dumps(tables))
    for command in ("check", "train"):
        outcome = run_command(capsys, command, config)
        assert outcome.status == 0, outcome.said
    return load_file(folder / "out" / "lora.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two files have the same tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "is_archive"), [("v1-5-pruned.ckpt", True), ("v1-5-pruned.safetensors", True), ("v1-5-pruned.ckpt", False)]
)
def test_training_on_a_published_checkpoint(
    train_tables: Tables,
    tiny_sd1_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_archive: bool,
    name: str,
) -> None:
    """A run on such a file, whatever it is called, gives to the bit what it gives on the model as .safetensors."""
    for folder in ("plain", "pickled"):
        (tmp_path / folder).mkdir()
    train_tables["model"]["path"] = str(tiny_sd1_file)
    plain = trained(train_tables, tmp_path / "plain", capsys)
    file = as_published(load_file(tiny_sd1_file), tmp_path / name, is_archive)
    train_tables["model"]["path"] = str(file)
    assert equal(trained(train_tables, tmp_path / "pickled", capsys), plain)


def pickled(source: Path, target: Path) -> Path:
    """The same tensors in a PyTorch file."""
    torch.save(load_file(source), target)
    return target


def as_safetensors(source: Path, target: Path) -> Path:
    """The same file under another name."""
    return Path(shutil.copy(source, target))


def vae(tables: Tables, part: Path, _lora: Path) -> None:
    tables["model"]["vae"] = str(part)


def base_weights(tables: Tables, _part: Path, lora: Path) -> None:
    tables["model"]["base_weights"] = [str(lora)]


def network_weights(tables: Tables, _part: Path, lora: Path) -> None:
    tables["network"] = {"weights": str(lora), "rank_from_weights": True}


@pytest.mark.parametrize("place", [vae, base_weights, network_weights])
def test_names_that_lie(
    train_tables: Tables,
    tiny_sd1: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: Callable[[Tables, Path, Path], None],
) -> None:
    """A VAE or LoRA is the same under the right name, pickled under .safetensors, and as safetensors under .ckpt."""
    (tmp_path / "start").mkdir()
    trained(train_tables, tmp_path / "start", capsys)
    sound = {
        "vae": tiny_sd1 / "vae" / "diffusion_pytorch_model.safetensors",
        "lora": tmp_path / "start" / "out" / "lora.safetensors",
    }
    results = []
    for write, suffix in ((as_safetensors, "safetensors"), (pickled, "safetensors"), (as_safetensors, "ckpt")):
        folder = tmp_path / f"{write.__name__}-{suffix}"
        folder.mkdir()
        files = [write(source, folder / f"{name}.{suffix}") for name, source in sound.items()]
        assert {kind_of_file(file) for file in files} == {"pickle" if write is pickled else "safetensors"}
        place(train_tables, *files)
        results.append(trained(train_tables, folder, capsys))
    assert all(equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_hashes_of_misnamed_weights(tmp_path: Path, suffix: str) -> None:
    """The hash of weights is that of their numbers, however they are stored and whatever the file is called."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(4).half()}
    save_file(tensors, tmp_path / f"one.{suffix}")
    torch.save(tensors, tmp_path / f"two.{suffix}")
    torch.save({"state_dict": tensors}, tmp_path / f"three.{suffix}", _use_new_zipfile_serialization=False)
    hashes = [hash_of_weights(file, {name: name for name in summarize(file).tensors}) for file in tmp_path.glob("*.*")]
    assert len(hashes) == 3
    assert len(set(hashes)) == 1
