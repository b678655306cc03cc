"""Runs with network modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lorakit_network_modules.component import NetworkModuleConfig
from lycoris.kohya import create_network_from_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit
from lorakit.api import AdapterError, ConfigError, with_import_path
from lorakit.testing.contracts.tiny_batch import make_batch, predict, read_model
from lorakit.testing.models import make_tiny_sdxl
from lorakit.testing.runs import train_config

PRESET = Path(__file__).with_name("transformers.toml")
ALGORITHMS = {"loha": "hada_w1_a", "lokr": "lokr_w1"}


def trained(tables: dict[str, Any], folder: Path, file: str = "lora", **network: Any) -> Path:
    """The file of a run with LyCORIS."""
    section = {"name": "lycoris.kohya", "rank": 4, "alpha": 2.0, **network}
    changed = {**tables, "network": section, "output": {**tables["output"], "name": file}}
    return lorakit.train(train_config(changed, folder))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_trains_and_saves(train_tables: dict[str, Any], tmp_path: Path, algo: str) -> None:
    """LoHa and LoKr train with convolutions and text encoder, and leave a file with their own tensors."""
    path = trained(train_tables, tmp_path, args={"algo": algo, "conv_dim": 4, "preset": "full"})
    tensors = load_file(path)
    suffixes = {key.partition(".")[2] for key in tensors}
    assert ALGORITHMS[algo] in suffixes
    assert "alpha" in suffixes
    layers = {key.partition(".")[0] for key in tensors}
    assert "lora_unet_mid_block_resnets_0_conv1" in layers
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1" in layers
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert f'"algo": "{algo}"' in metadata["ss_network_args"]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_lycoris_reads_the_file(train_tables: dict[str, Any], tmp_path: Path, tiny_sd1: Path, algo: str) -> None:
    """LyCORIS, given the file and a fresh model, makes that model predict what the trained one predicts."""
    train_tables["optimizer"]["lr"] = 0.02
    path = trained(train_tables, tmp_path, parts=["unet"], args={"algo": algo})
    model = read_model(tiny_sd1)
    batch = make_batch(model)
    with torch.no_grad():
        base = predict(model, batch)
        network, tensors = create_network_from_weights(1.0, str(path), None, None, model.denoiser)
        network.apply_to(None, model.denoiser, apply_text_encoder=False, apply_unet=True)
        network.load_state_dict(tensors, strict=False)
        theirs = predict(model, batch)
    ours = _prediction_of_ours(path, tiny_sd1, algo)
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def _prediction_of_ours(path: Path, folder: Path, algo: str) -> Tensor:
    model = read_model(folder)
    component = with_import_path(NetworkModuleConfig, "lycoris.kohya")
    config = component(rank=4, alpha=2.0, parts=("unet",), args={"algo": algo})
    network = config.build(model.targets(("unet",)))
    network.load_adapter_state(load_file(path))
    with torch.no_grad():
        return predict(model, make_batch(model))


def test_runs_repeat_with_dropout(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """Two runs with module, rank and plain dropout give equal weights, whatever was drawn before."""
    settings = {"dropout": 0.2, "args": {"algo": "loha", "rank_dropout": 0.2, "module_dropout": 0.2}}
    torch.manual_seed(1)
    first = load_file(trained(train_tables, tmp_path, "first", **settings))
    torch.manual_seed(2)
    second = load_file(trained(train_tables, tmp_path, "second", **settings))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_continues_from_a_file(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """`network.weights` is where training starts; another alpha is refused rather than kept silently."""
    path = trained(train_tables, tmp_path, "first", args={"algo": "lokr"})
    train_tables["optimizer"]["lr"] = 1e-12
    again = trained(train_tables, tmp_path, "again", args={"algo": "lokr"}, weights=str(path))
    for key, tensor in load_file(path).items():
        torch.testing.assert_close(load_file(again)[key], tensor, rtol=0, atol=1e-8)
    with pytest.raises(AdapterError, match="alpha 2 in the file, 1 in the config"):
        trained(train_tables, tmp_path, "other", args={"algo": "lokr"}, weights=str(path), alpha=1.0)


@pytest.mark.parametrize("args", [{"algo": "loha", "use_scalar": True}, {"dora_wd": True}])
def test_resumes_exactly(train_tables: dict[str, Any], tmp_path: Path, args: dict[str, Any]) -> None:
    """A run that goes on from its state ends as one that was not stopped, though files hold other numbers or names."""
    train_tables["output"]["save_state"] = True
    args = {"preset": str(PRESET), **args}
    whole = load_file(trained(train_tables, tmp_path, "whole", args=args))
    train_tables["training"]["max_epochs"] = 1
    trained(train_tables, tmp_path, "part", args=args)
    section = {"name": "lycoris.kohya", "rank": 4, "alpha": 2.0, "args": args}
    train_tables["training"]["max_epochs"] = 2
    tables = {**train_tables, "network": section, "output": {**train_tables["output"], "name": "part"}}
    resumed = load_file(lorakit.train(train_config(tables, tmp_path), resume="latest"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_loraplus(tiny_sd1: Path) -> None:
    """The learning rates that a module gives its parameters are those they get, as LoRA+ of LyCORIS."""
    model = read_model(tiny_sd1)
    component = with_import_path(NetworkModuleConfig, "lycoris.kohya")
    args = {"loraplus_lr_ratio": 4, "loraplus_unet_lr_ratio": 8, "preset": "full"}
    network = component(args=args).build(model.targets(("text_encoder", "unet")))
    groups = network.parameter_groups(lambda _: 0.5)
    assert {group.name: group.lr for group in groups} == {
        "text_encoder": 0.5, "text_encoder plus": 2.0, "unet": 0.5, "unet plus": 4.0,
    }  # fmt: skip
    assert sum(len(group.parameters) for group in groups) == sum(1 for p in network.parameters() if p.requires_grad)


def test_copies_for_diffusers(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """Where a module's adapters are LoRA's, of layers that pipelines have names for, there is a copy for diffusers."""
    train_tables["observers"] = [{"name": "diffusers"}]
    path = trained(train_tables, tmp_path, args={"algo": "lora", "preset": str(PRESET)})
    copy = load_file(path.with_name("lora.diffusers.safetensors"))
    assert "unet.mid_block.attentions.0.proj_in.lora_A.weight" in copy
    assert len(copy) == len(load_file(path)) * 2 / 3


def test_a_package_that_is_missing(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """A package that is not installed is named before anything is read."""
    with pytest.raises(ConfigError, match=r"network\.name: the package 'lycoriss' is not installed"):
        trained(train_tables, tmp_path, name="lycoriss.kohya")


def test_a_module_that_is_none(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """A module without `create_network`, and arguments that it refuses, are named."""
    with pytest.raises(AdapterError, match=r"network\.name: lycoris\.config is not a network module"):
        trained(train_tables, tmp_path, name="lycoris.config")
    with pytest.raises(AdapterError, match=r"network\.args: lycoris\.kohya rejects them: KeyError\('lohaa'\)"):
        trained(train_tables, tmp_path, args={"algo": "lohaa"})
    with pytest.raises(AdapterError, match=r"network\.args: lycoris\.kohya removes the weights of lora_te_text_model"):
        trained(train_tables, tmp_path, args={"algo": "full"})


def test_layers_get_their_forward_back(tiny_sd1: Path) -> None:
    """The module leaves no trace in the model's layers: detached, they are as they were read."""
    model = read_model(tiny_sd1)
    component = with_import_path(NetworkModuleConfig, "lycoris.kohya")
    network = component(args={"algo": "loha"}).build(model.targets(("text_encoder", "unet")))
    network.detach()
    layers: list[nn.Module] = [*model.denoiser.modules(), *model.text_encoder.module.modules()]
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_sdxl(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """SDXL's layers have the keys that all tools know them by, in both text encoders, too."""
    train_tables["model"] = {"path": str(make_tiny_sdxl(tmp_path / "xl"))}
    tensors = load_file(trained(train_tables, tmp_path, args={"algo": "lokr"}))
    layers = {key.partition(".")[0] for key in tensors}
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1",
    } <= layers
    assert all(key.startswith(("lora_unet_", "lora_te1_", "lora_te2_")) for key in layers)
    assert not any("down_blocks" in key or "mid_block" in key for key in layers)
