"""Runs on a base model that LoRA files are merged into, and what is wrong with files, before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorakit.config.load import read_config
from lorakit.errors import AdapterError, ConfigError
from lorakit.plugins.catalog import Catalog
from lorakit.training.prepare import prepare
from lorakit.training.setup import run_training


def test_trains_on_the_merged_model(make_config, catalog: Catalog, tmp_path: Path) -> None:
    """A run on merged weights ends elsewhere than one without, encodes its captions anew, and says so."""
    strong = make_config(optimizer={"lr": 0.1}, network={"parts": ["text_encoder"]})
    first = run_training(prepare(strong), catalog)
    first.rename(tmp_path / "first.safetensors")
    cache = str(tmp_path / "cache")
    unet = {"network": {"parts": ["unet"]}, "data": {"cache_dir": cache}, "training": {"max_steps": 2}}
    plain = load_file(run_training(prepare(make_config(**unet)), catalog))
    entries = len(list(Path(cache).rglob("*.safetensors")))
    config = make_config(**unet, model={"base_weights": ["first.safetensors"], "base_weights_multipliers": [0.5]})
    file = run_training(prepare(config), catalog)
    assert len(list(Path(cache).rglob("*.safetensors"))) > entries
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in load_file(file).items())
    with safe_open(file, "pt") as stream:
        (entry,) = json.loads(stream.metadata()["ss_base_weights"])
    assert (entry["name"], entry["multiplier"]) == ("first.safetensors", 0.5)
    repeated = read_config(config.output.dir / "test.config.toml", catalog=catalog)
    assert repeated.model == config.model
    again = load_file(run_training(prepare(repeated), catalog))
    assert all(torch.equal(tensor, again[key]) for key, tensor in load_file(file).items())


def test_a_file_that_does_not_fit_stops_before_anything_is_encoded(make_config, catalog: Catalog, tmp_path) -> None:
    """A LoRA of another model is refused by name before the cache is filled."""
    from safetensors.torch import save_file

    key = "lora_unet_mid_block_attentions_9_proj_in"
    tensors = {f"{key}.lora_up.weight": torch.ones(2, 2), f"{key}.lora_down.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "other.safetensors")
    config = make_config(model={"base_weights": ["other.safetensors"]}, data={"cache_dir": str(tmp_path / "cache")})
    with pytest.raises(AdapterError, match=r"other\.safetensors cannot be merged .*attentions_9_proj_in\.lora_up"):
        run_training(prepare(config), catalog)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_problems_when_the_config_is_read(make_config, tiny_sd1: Path, tmp_path: Path) -> None:
    """Missing files, files without a LoRA, and numbers for no file are said when the config is read, all at once."""
    model = str(tiny_sd1 / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError) as caught:
        make_config(model={"base_weights": ["gone.safetensors", model], "base_weights_multipliers": [1, 2, 3]})
    found = {problem.key: problem.message for problem in caught.value.problems}
    assert found["model.base_weights[0]"] == f"{tmp_path / 'gone.safetensors'} does not exist"
    assert found["model.base_weights[1]"].endswith("is a U-Net without a text encoder, which cannot be merged")
    assert "more numbers" in found["model.base_weights_multipliers"]
