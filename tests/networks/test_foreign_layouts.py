"""LoRA files of diffusers and PEFT to start from, as those libraries write them; other tools' names for layers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.networks import LierlaConfig
from lorakit.checkpoints import summarize
from lorakit.checkpoints.lora_files import lora_names
from lorakit.checkpoints.lora_names import own_name
from lorakit.errors import AdapterError
from lorakit.models.families.sd.state_dict_keys import original_unet_name
from lorakit.models.interfaces import AdaptationTarget
from lorakit.networks.adapter_file import load_initial_weights
from lorakit.networks.network import Network
from lorakit.testing.models import FULL_SD1

KEYS = Path(__file__).with_name("lora_keys_sd15.tsv")
UNET: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 2,
    "target_modules": ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1"],
    "rank_pattern": {"proj_in": 2},
    "alpha_pattern": {"to_q": 3, "^mid_block.attentions.0.proj_in": 7},
}
TEXT: dict[str, Any] = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"], "use_rslora": True}


def adapted(module: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """A module with adapters of PEFT, far from where they start."""
    module = get_peft_model(module, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            factor = 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
            near = parameter.data * factor if "magnitude" in name else None
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator) if near is None else near
    return module


@pytest.fixture(scope="module")
def parts(tiny_sd1: Path) -> dict[str, nn.Module]:
    """The tiny model's parts with adapters of PEFT: LoRA with patterns of alphas, and rank-stabilized LoRA."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet")
    text = CLIPTextModel.from_pretrained(tiny_sd1 / "text_encoder")
    return {"unet": adapted(unet, UNET), "text_encoder": adapted(text, TEXT)}


def updates_of_peft(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What PEFT adds to each layer's weights, by key, in float64."""
    found = {}
    for part, module in parts.items():
        for path, layer in module.double().named_modules():
            if hasattr(layer, "get_delta_weight") and layer.lora_A:
                name = f"{part}.{path.removeprefix('base_model.model.').removeprefix('text_model.')}.lora_A.weight"
                found[own_name(name).partition(".")[0]] = layer.get_delta_weight("default").detach()
        module.float()
    return found


def updates(network: Network) -> dict[str, Tensor]:
    """What a network adds to each layer's weights, by key, in float64."""
    return {
        adapter.key: adapter.scale
        * torch.einsum("or,r...->o...", adapter.lora_up.double().flatten(1), adapter.lora_down.double())
        for adapter in network.adapters
    }


def targets_of(folder: Path) -> list[AdaptationTarget]:
    """The layers of the tiny model."""
    return list(SD1Config(path=str(folder)).build(torch.device("cpu"), torch.float32).targets(("text_encoder", "unet")))


def started(folder: Path, file: Path, **options: Any) -> Network:
    """A network that has started from a file, with its ranks."""
    targets = targets_of(folder)
    network = LierlaConfig(weights=file, rank_from_weights=True, **options).build(targets)
    network.load_adapter_state(load_initial_weights(file, targets), str(file))
    return network


def written_by_diffusers(parts: dict[str, nn.Module], folder: Path, old: bool, bare: bool = False) -> Path:
    """The file that diffusers' pipeline writes; `old` with the names of older versions, `bare` without metadata."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = {part: get_peft_model_state_dict(module) for part, module in parts.items()}
    layers = {
        part: {name.removeprefix("base_model.model."): tensor for name, tensor in own.items()}
        for part, own in layers.items()
    }
    metadata = {
        f"{part}_lora_adapter_metadata": {
            key: list(value) if isinstance(value, set) else value
            for key, value in module.peft_config["default"].to_dict().items()
        }
        for part, module in parts.items()
    }
    if old:
        layers = {part: convert_state_dict_to_diffusers(own) for part, own in layers.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        **({} if bare else metadata),
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("old", [False, True])
def test_files_of_diffusers(parts: dict[str, nn.Module], tiny_sd1: Path, tmp_path: Path, old: bool) -> None:
    """Updates are PEFT's own, with patterns of alphas and √rank, whatever the version's names are."""
    file = written_by_diffusers(parts, tmp_path, old)
    found, expected = updates(started(tiny_sd1, file)), updates_of_peft(parts)
    assert found.keys() == expected.keys()
    for key, update in found.items():
        assert torch.allclose(update.view(expected[key].shape), expected[key], rtol=1e-6, atol=1e-9), key


def test_files_of_diffusers_without_settings(parts: dict[str, nn.Module], tiny_sd1: Path, tmp_path: Path) -> None:
    """Where nothing says an alpha, updates have the scale 1, as in diffusers; factors are the file's, bit for bit."""
    file = written_by_diffusers(parts, tmp_path, old=True, bare=True)
    network, tensors = started(tiny_sd1, file), load_file(file)
    assert all(adapter.scale == 1 for adapter in network.adapters)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.down.weight"
    loaded = network.adapter_state()
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight"
    assert torch.equal(loaded[key], tensors[name])
    assert len(loaded) / 3 == len(tensors) / 2


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_folders_of_peft(parts: dict[str, nn.Module], tiny_sd1: Path, tmp_path: Path, part: str, suffix: str) -> None:
    """`save_pretrained` leaves alphas in `adapter_config.json` beside the weights."""
    parts[part].save_pretrained(tmp_path, safe_serialization=suffix == ".safetensors")
    file = tmp_path / f"adapter_model{suffix}"
    if suffix == ".bin" and not file.exists():
        torch.save(load_file(tmp_path / "adapter_model.safetensors"), file)
    network = started(tiny_sd1, file, parts=(part,))
    expected = updates_of_peft({part: parts[part]})
    found = updates(network)
    assert found.keys() == expected.keys()
    for key, update in found.items():
        assert torch.allclose(update.view(expected[key].shape), expected[key], rtol=1e-6, atol=1e-9), key


def test_dora_of_peft(tiny_sd1: Path, tmp_path: Path) -> None:
    """Magnitudes of linear layers and convolutions are taken over: the model computes what it does with PEFT."""
    from diffusers import UNet2DConditionModel

    unet = adapted(UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet"), {**UNET, "use_dora": True}).double().eval()
    unet.save_pretrained(tmp_path)
    model = SD1Config(path=str(tiny_sd1)).build(torch.device("cpu"), torch.float64)
    file = tmp_path / "adapter_model.safetensors"
    config = LierlaConfig(weights=file, rank_from_weights=True, dora=True, parts=("unet",))
    network = config.build(model.targets(("unet",)))
    network.load_adapter_state(load_initial_weights(file))
    generator = torch.Generator().manual_seed(1)
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([500])
    states = torch.randn(1, 77, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = unet(latents, timesteps, states).sample
        found = model.predict(latents, timesteps, {"hidden_states": states})
        plain = unet.unload()(latents, timesteps, states).sample
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-3)


def names_of_original_code() -> Iterator[tuple[str, str]]:
    """Each layer of Stable Diffusion 1.5's U-Net in sd-scripts' words, and its path in the original code."""
    settings = {
        **FULL_SD1["unet"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SD1["unet"])
    paths = {f"lora_unet_{path.replace('.', '_')}": path for path, _ in unet.named_modules()}
    with KEYS.open(encoding="utf-8") as table:
        keys = [row["lora_name"] for row in csv.DictReader(table, delimiter="\t")]
    for key in keys:
        if key in paths:
            yield key, original_unet_name(f"{paths[key]}.weight", settings).removesuffix(".weight")


def test_names_of_the_original_code() -> None:
    """Layers called as in the original code, with underscores or dots, are found for all of the U-Net."""
    pairs = list(names_of_original_code())
    assert len(pairs) == 278
    for key, path in pairs:
        expected = f"{key}.lora_down.weight"
        assert own_name(f"lora_unet_{path.replace('.', '_')}.lora_down.weight") == expected
        assert own_name(f"diffusion_model.{path}.lora_A.weight") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "unet.mid_block.x.attn1.processor.to_out_lora.up.weight",
            "lora_unet_mid_block_x_attn1_to_out_0.lora_up.weight",
        ),
        ("mid_block.x.attn1.processor.to_q_lora.down.weight", "lora_unet_mid_block_x_attn1_to_q.lora_down.weight"),
        ("unet.mid_block.x.lora_A.default.weight", "lora_unet_mid_block_x.lora_down.weight"),
        ("unet.mid_block.x.alpha", "lora_unet_mid_block_x.alpha"),
        ("base_model.model.mid_block.x.lora_magnitude_vector.default.weight", "lora_unet_mid_block_x.dora_scale"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
            "lora_te_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight",
        ),
        (
            "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight",
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        ),
        ("lora_te1_text_model_encoder_x.alpha", "lora_te_text_model_encoder_x.alpha"),
        ("lycoris_text_model_encoder_x.lora_up.weight", "lora_te_text_model_encoder_x.lora_up.weight"),
        ("lycoris_mid_block_x.lora_up.weight", "lora_unet_mid_block_x.lora_up.weight"),
        ("lora_unet_mid_block_x.lora_A.weight", "lora_unet_mid_block_x.lora_down.weight"),
        ("lora_te2_text_model_encoder_x.alpha", "lora_te2_text_model_encoder_x.alpha"),
        ("transformer.x.lora_A.weight", "transformer.x.lora_A.weight"),
    ],
)
def test_names(name: str, expected: str) -> None:
    """Each tool's name for a tensor, and sd-scripts'; what is for no layer of Stable Diffusion keeps its name."""
    assert own_name(name) == expected


def test_layers_that_are_there_keep_their_names(tmp_path: Path) -> None:
    """Where a model has layers of a name, as Stable Diffusion XL has two text encoders, it is not changed."""
    name = "lora_te1_text_model_x.lora_down.weight"
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    summary = summarize(tmp_path / "a.safetensors")
    assert set(lora_names(summary, {"lora_te1_text_model_x": "lora_te1_text_model_x"}).in_file) == {name}
    assert set(lora_names(summary).in_file) == {"lora_te_text_model_x.lora_down.weight"}


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"lora_alpha": 3}, 3.0),
        ({"lora_alpha": 3, "use_rslora": True}, 3 * math.sqrt(2)),
        ({"lora_alpha": 3, "alpha_pattern": {"proj_in": 5}}, 5.0),
        ({"lora_alpha": 3, "alpha_pattern": {r"^mid_block\.x\.proj_in$": 5}}, 5.0),
        ({"lora_alpha": 3, "alpha_pattern": {"oj_in": 5, "x": 6}}, 3.0),
        ({}, 2.0),
        ({"unet.lora_alpha": 4, "text_encoder.lora_alpha": 9}, 4.0),
        ({"text_encoder.lora_alpha": 9}, 2.0),
    ],
)
def test_alphas_of_settings(tmp_path: Path, settings: dict[str, Any], alpha: float) -> None:
    """The alpha is that of the pattern for the layer, or of all; patterns match whole steps of a path."""
    file = tmp_path / "a.safetensors"
    tensors = {f"unet.mid_block.x.proj_in.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})
    assert load_initial_weights(file)["lora_unet_mid_block_x_proj_in.alpha"].item() == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ('{"lora_alpha": "a"}', "an alpha is a"),
        ('{"lora_alpha": -1}', "an alpha is -1"),
        ('{"lora_alpha": NaN}', "an alpha is nan"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+b": 2}}', r"regular expression, \(a\+\)\+b"),
        ('{"alpha_pattern": 3}', "alpha_pattern is no table"),
        ("[" * 100_000, "cannot be used"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: str, told: str) -> None:
    """A file whose settings are damaged, or would have a stranger's pattern run, is refused by name."""
    file = tmp_path / "a.safetensors"
    save_file({"unet.mid_block.x.lora_A.weight": torch.ones(2, 2)}, file, {"lora_adapter_metadata": settings})
    with pytest.raises(AdapterError, match=rf"a\.safetensors.*{told}"):
        load_initial_weights(file)


def test_two_adapters_for_a_layer(tmp_path: Path) -> None:
    """Of a layer that is there under two names, neither is taken; both are named."""
    names = ("lora_unet_mid_block_x.lora_down.weight", "unet.mid_block.x.lora_A.weight")
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=f"two adapters for one layer: {names[0]} and {names[1]}"):
        load_initial_weights(tmp_path / "a.safetensors")
