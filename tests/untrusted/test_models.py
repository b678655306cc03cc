"""Models and LoRA files of strangers whose settings or numbers are not those of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import AdapterError, ModelError
from lorakit.models.families.sd.checkpoint import SDCheckpoint
from lorakit.models.families.sd.infer_config import clip_settings
from lorakit.models.families.sd.text_encoder import clip_module
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.weights.modules import empty_module
from lorakit.networks.adapter_file import load_initial_weights


def with_settings(model: Path, folder: Path, part: str, **settings: Any) -> SDCheckpoint:
    """A copy of a model in a folder with other settings of a part."""
    shutil.copytree(model, folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return SDCheckpoint(folder)


def check(model: SDCheckpoint) -> None:
    """What is looked at before training."""
    model.check_vae()
    model.check()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_settings_that_name_code(tiny_sd1: Path, tmp_path: Path, key: str) -> None:
    """A text encoder's settings cannot make transformers fetch a kernel from the Hub: what is for it is left out."""
    part = with_settings(tiny_sd1, tmp_path / "model", "text_encoder", **{key: "stranger/kernel"}).part("text_encoder")
    module = empty_module(part, clip_module)
    assert "stranger" not in str(vars(module.config))


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"transformer_layers_per_block": [1, 1, 1, 10**9]}),
        ("vae", {"layers_per_block": 10**9}),
        ("vae", {"block_out_channels": [32] * 10_000}),
    ],
)
def test_settings_of_endless_layers(tiny_sd1: Path, tmp_path: Path, part: str, settings: dict[str, Any]) -> None:
    """Settings of more layers than the file has tensors are refused before a module is made."""
    model = with_settings(tiny_sd1, tmp_path / "model", part, **settings)
    with pytest.raises(ModelError, match=rf"{part}/config\.json tells of more layers than .* has tensors"):
        check(model)


@pytest.mark.parametrize("factor", ["x", 0, -1, float("nan"), float("inf"), None])
def test_scaling_factors_that_are_none(tiny_sd1: Path, tmp_path: Path, factor: object) -> None:
    """A VAE's scaling factor is a positive number or the folder is refused."""
    model = with_settings(tiny_sd1, tmp_path / "model", "vae", scaling_factor=factor)
    with pytest.raises(ModelError, match="scaling_factor must be a positive number"):
        check(model)


def test_layers_are_counted_in_one_go() -> None:
    """What is inferred from names takes time in proportion to their number; a gap is something that is missing."""
    shapes: dict[str, tuple[int, ...]] = {
        f"encoder.layers.{index}.x": () for index in range(200_000) if index != 150_000
    }
    shapes |= {"embeddings.token_embedding.weight": (9, 64), "embeddings.position_embedding.weight": (77, 64)}
    shapes["encoder.layers.0.mlp.fc1.weight"] = (64, 64)
    assert clip_settings(shapes)["num_hidden_layers"] == 200_000


def test_layers_are_not_counted_beyond_the_tensors() -> None:
    """One name with a huge number in it makes no model of that many layers."""
    shapes = {"embeddings.token_embedding.weight": (9, 64), "encoder.layers.0.mlp.fc1.weight": (64, 64)}
    with pytest.raises(ValueError, match="counted further than there are tensors"):
        clip_settings({**shapes, "encoder.layers.99999999.x": ()})


def test_tokens_beyond_the_table(tiny_sd1: Path, tmp_path: Path) -> None:
    """Of a vocabulary with gaps, the largest id counts, as it is what the text encoder would be asked for."""
    shutil.copytree(tiny_sd1 / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    vocabulary["far</w>"] = 10**6
    file.write_text(json.dumps(vocabulary))
    assert CaptionTokenizer(tmp_path / "tokenizer").vocabulary_size == 10**6 + 1


def small_tokenizer(folder: Path, settings: dict[str, str]) -> Path:
    """A folder with a tokenizer that knows two letters, with these settings in its model."""
    vocabulary = {"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    made = json.loads(CaptionTokenizer(folder).tokenizer.to_str())
    made["model"] |= settings
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


def test_a_tokenizer_that_makes_its_library_panic(tmp_path: Path) -> None:
    """A prefix that is longer than a word of the merges is refused, though the library's panic is no exception."""
    folder = small_tokenizer(tmp_path, {"continuing_subword_prefix": "longer"})
    with pytest.raises(ModelError, match=f"{folder} cannot be read"):
        CaptionTokenizer(folder)


def test_a_tokenizer_without_its_unknown_word(tmp_path: Path) -> None:
    """What shows only when a caption is read is told by the folder, too."""
    tokenizer = CaptionTokenizer(small_tokenizer(tmp_path, {"unk_token": "gone"}))
    with pytest.raises(ModelError, match=f"{tmp_path} cannot be read"):
        tokenizer(["c"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1 + 2j])
def test_factors_that_are_no_numbers(tmp_path: Path, value: complex) -> None:
    """A LoRA file with NaN, infinity or complex numbers is nothing to start from; the tensor is named."""
    down = torch.full((2, 4), value)
    save_file({"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": torch.ones(4, 2)}, tmp_path / "a.st")
    with pytest.raises(AdapterError, match=r"a\.st cannot be trained on: lora_unet_x\.lora_down\.weight holds NaN"):
        load_initial_weights(tmp_path / "a.st")
