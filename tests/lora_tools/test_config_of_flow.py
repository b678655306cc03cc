"""The config that `lorakit lora info --config` prints for LoRA of FLUX.1, Chroma, Z-Image and Anima."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import lorakit
from lorakit.cli.group import cli
from tests.lora_tools.files import lora, write

GROUPS = {
    "flux1": {"double": 3, "single": 2}, "chroma": {"single": 2}, "z_image": {"layers": 2}, "anima": {"blocks": 3},
}  # fmt: skip
NETWORKS: Mapping[str, dict[str, Any]] = {
    "layers": {
        "name": "lierla", "rank": 3, "alpha": 2.0, "layers": ["attention", "text_encoder"], "rank_dropout": 0.1,
    },
    "dora": {"name": "lierla", "rank": 4, "alpha": 1.0, "dora": True, "parts": None},
    "lokr": {"name": "lokr", "rank": 4, "alpha": 2.0, "factor": 4, "decompose_both": True, "module_dropout": 0.1},
}  # fmt: skip
"""With `parts` at None, the transformer alone is trained."""


def info(file: Path) -> str:
    """What the command prints; it must end well."""
    result = CliRunner().invoke(cli, ["lora", "info", str(file), "--config"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("family", "network"),
    [("flux1", "layers"), ("chroma", "lokr"), ("z_image", "dora"), ("anima", "layers"), ("anima", "lokr")],
)
def test_it_repeats_the_run(
    family: str, network: str, tiny_flow: Callable[[str], Path], photographs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where model and images are at the names that files hold, the printed config trains the same, bit for bit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_flow(family))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "2_photos").symlink_to(photographs)
    parts = [part.name for part in _family(family).parts]
    own = {"parts": parts, "group_ranks": GROUPS[family], **NETWORKS[network]}
    tables: dict[str, Any] = {
        "model": {"path": "model"},
        "data": {"image_dir": "train/2_photos", "num_repeats": 2, "resolution": 64, "batch_size": 2,
                 "shuffle_caption": True},
        "network": {key: value for key, value in own.items() if value is not None},
        "optimizer": {"lr": 2e-3, "text_encoder_lr": [1e-3, 5e-4] if len(parts) > 2 else 1e-3, "weight_decay": 0.03},
        "lr_scheduler": {"name": "cosine", "warmup_steps": 1},
        "timesteps": {"name": "logit_normal", "std": 0.8, "shift": 2.0, "max": 0.9},
        "loss": {"type": "huber", "huber_schedule": "exponential", "huber_c": 0.2, "ip_noise_gamma": 0.1},
        "training": {"max_steps": 3, "device": "cpu", "seed": 7},
        "output": {"dir": "out", "name": "first"},
        "saver": {"name": "safetensors", "precision": "fp32"},
    }  # fmt: skip
    if own["parts"] is None:
        del tables["optimizer"]["text_encoder_lr"]
    (tmp_path / "first.toml").write_text(tomlkit.dumps(tables))
    first = lorakit.train(tmp_path / "first.toml")
    (tmp_path / "again.toml").write_text(info(first))
    again = lorakit.train(tmp_path / "again.toml", overrides=["training.device=cpu"])
    assert again != first
    left, right = load_file(first), load_file(again)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def _family(name: str) -> Any:
    from lorakit.api.model_family import ModelFamilyConfig
    from lorakit.plugins.catalog import Catalog

    return Catalog.discover().find(ModelFamilyConfig, name)


SHARED = {
    "ss_network_dim": "16", "ss_network_alpha": "8.0", "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.05)",
    "ss_learning_rate": "0.0002", "ss_unet_lr": "0.0002", "ss_lr_scheduler": "constant", "ss_max_train_steps": "1500",
    "ss_seed": "42", "ss_mixed_precision": "bf16", "ss_batch_size_per_device": "1", "ss_resolution": "(1024, 1024)",
    "ss_gradient_checkpointing": "True", "ss_sd_model_name": "base.safetensors", "ss_output_name": "cat",
    "ss_noise_offset": "None", "ss_min_snr_gamma": "None", "ss_clip_skip": "None", "ss_weighting_scheme": "uniform",
    "ss_logit_mean": "0.0", "ss_logit_std": "1.0", "ss_mode_scale": "1.29",
}  # fmt: skip
"""What sd-scripts writes, whatever the model."""
FLUX = {
    **SHARED, "ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora", "ss_model_type": "flux",
    "ss_network_module": "networks.lora_flux", "ss_guidance_scale": "1.0", "ss_model_prediction_type": "raw",
    "ss_apply_t5_attn_mask": "False", "ss_timestep_sampling": "shift", "ss_sigmoid_scale": "1.0",
    "ss_discrete_flow_shift": "3.1582", "ss_network_args": json.dumps({"train_blocks": "double"}),
}  # fmt: skip
CHROMA = {
    **FLUX, "ss_base_model_version": "chroma", "modelspec.architecture": "chroma/lora", "ss_model_type": "chroma",
    "ss_guidance_scale": "0.0", "ss_apply_t5_attn_mask": "True", "ss_timestep_sampling": "sigmoid",
    "ss_discrete_flow_shift": "3.0",
}  # fmt: skip
ANIMA = {
    **SHARED, "ss_base_model_version": "anima", "modelspec.architecture": "anima-preview/lora",
    "ss_network_module": "networks.lora_anima", "ss_timestep_sampling": "sigmoid", "ss_sigmoid_scale": "1.5",
    "ss_discrete_flow_shift": "1.0", "ss_network_args": json.dumps({"rank_dropout": "0.1"}),
}  # fmt: skip
DOUBLE = {"lora_unet_double_blocks_0_img_attn_qkv": (24, 8), "lora_unet_double_blocks_0_txt_mlp_0": (32, 8)}
CASES: Mapping[str, tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, Any], dict[str, Any]]] = {
    "flux1": (FLUX, DOUBLE, {"group_ranks": {"single": 0}}, {"name": "logit_normal", "shift": 3.1582}),
    "chroma": (CHROMA, DOUBLE, {"group_ranks": {"single": 0}}, {"name": "logit_normal", "shift": 1.0}),
    "anima": (
        ANIMA, {"lora_unet_blocks_0_self_attn_q_proj": (12, 10)}, {"rank_dropout": 0.1},
        {"name": "logit_normal", "shift": 1.0, "std": 1.5},
    ),
}  # fmt: skip
"""Metadata and layers of a file, and what is in [network] and [timesteps] for it."""


@pytest.mark.parametrize("name", CASES)
def test_files_of_sd_scripts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata are read as the options of the script that has trained the file, and nothing is told amiss."""
    monkeypatch.chdir(tmp_path)
    metadata, shapes, network, timesteps = CASES[name]
    (tmp_path / "train" / "1_cat").mkdir(parents=True)
    file = write(tmp_path / "cat.safetensors", lora(shapes, rank=16, alpha=8.0), metadata)
    result = CliRunner().invoke(cli, ["lora", "info", str(file), "--config"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not result.stderr
    config = tomllib.loads(result.stdout)
    assert (config["model"]["family"], config["model"]["path"]) == (name, "base.safetensors")
    expected = {"name": "lierla", "rank": 16, "alpha": 8.0, "parts": ["transformer"]}
    assert config["network"] == {**expected, **network}
    assert config["timesteps"] == timesteps
    assert (config["optimizer"]["lr"], config["optimizer"]["weight_decay"]) == (2e-4, 0.05)
    assert config["training"]["max_steps"] == 1500


def test_metadata_that_were_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no number, list or text is left as it stands, and the config can be read all the same."""
    monkeypatch.chdir(tmp_path)
    tensors = {f"diffusion_model.layers.0.attention.to_q.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}
    arguments = {"module_dropout": "None", "group_ranks": "layers=x", "block_dims": "[None]", "rank_dropout": "{}"}
    metadata = {
        "modelspec.implementation_version": "lorakit/0.1.0", "ss_network_args": json.dumps(arguments),
        "ss_timesteps": '{"name": [], "std": null, "shift": 2}', "ss_text_encoder_lr": "[None]", "ss_steps": "x",
        "ss_batch_size_per_device": "inf",
    }  # fmt: skip
    config = tomllib.loads(info(write(tmp_path / "z.safetensors", tensors, metadata)))
    assert config["timesteps"] == {"shift": 2}
    assert config["network"]["module_dropout"] == "None"
    assert "group_ranks" not in config["network"]


def test_files_of_other_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for Z-Image says little, but its family, rank and parts; one of a model that is not trained is refused."""
    monkeypatch.chdir(tmp_path)
    tensors = {f"diffusion_model.layers.0.attention.to_q.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}
    metadata = {"ss_base_model_version": "zimage", "ss_network_module": "networks.lora_zimage", "ss_steps": "100"}
    config = tomllib.loads(info(write(tmp_path / "z.safetensors", tensors, metadata)))
    assert config["model"]["family"] == "z_image"
    assert config["network"] == {"name": "lierla", "rank": 4, "alpha": 4.0, "parts": ["transformer"]}
    other = {"lora_unet_joint_blocks_0_x_block_attn_qkv": (12, 4)}
    file = write(tmp_path / "sd3.safetensors", lora(other), {"ss_base_model_version": "sd3"})
    result = CliRunner().invoke(cli, ["lora", "info", str(file), "--config"])
    assert result.exit_code != 0
    assert "is for Stable Diffusion 3, which lorakit does not train" in str(result.exception or result.output)
