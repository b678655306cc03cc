"""LoRA files for Stable Diffusion XL: names of all tools, what diffusers makes of ours, and training by parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from lorakit.builtin.model_families.sdxl import SDXLConfig
from lorakit.builtin.networks import C3LierConfig, LierlaConfig
from lorakit.checkpoints.lora_names import own_name_xl
from lorakit.config.dump import to_toml
from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError
from lorakit.models.interfaces import DiffusionModel
from lorakit.networks.adapter_file import AdapterFile, SafetensorsSaver, load_initial_weights
from lorakit.networks.config import LoRAConfig
from lorakit.previews.prompts import Prompt, preview_jobs
from lorakit.testing.contracts.tiny_batch import loss_of, make_batch

PARTS = ("unet", "text_encoder", "text_encoder_2")


def built(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> DiffusionModel:
    """The model at a path, on the CPU."""
    return SDXLConfig(path=str(path), **settings).build(torch.device("cpu"), dtype)


NAMES = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
    ),
    "lora_unet_input_blocks_3_0_op": ("unet.down_blocks.0.downsamplers.0.conv",),
    "lora_unet_output_blocks_2_2_conv": ("lora_unet_up_blocks_0_upsamplers_0_conv",),
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
        "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    ),
    "lora_unet_middle_block_2_in_layers_2": ("unet.mid_block.resnets.1.conv1",),
    "lora_unet_output_blocks_8_0_skip_connection": ("lora_unet_up_blocks_2_resnets_2_conv_shortcut",),
    "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
    ),
    "lora_te2_text_model_encoder_layers_31_mlp_fc1": ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1",),
}


@pytest.mark.parametrize("key", NAMES)
def test_names_of_other_tools(key: str) -> None:
    """Each spelling becomes the key that sd-scripts has."""
    for name in (key, *NAMES[key]):
        end = "lora_A.weight" if "." in name else "lora_down.weight"
        assert own_name_xl(f"{name}.{end}") == f"{key}.lora_down.weight"
    assert own_name_xl("something.else") == "something.else"


def test_names_of_all_layers(tiny_sdxl_file: Path) -> None:
    """Every layer's names lead to its key, without the model and with it."""
    for target in built(tiny_sdxl_file).targets(PARTS):
        for name in target.names:
            end = "lora_down.weight" if name.startswith("lora_") else "lora_A.weight"
            assert own_name_xl(f"{name}.{end}") == f"{target.key}.lora_down.weight"


def randomized(model: DiffusionModel, network: LoRAConfig) -> dict[str, torch.Tensor]:
    """The tensors of a network on all parts of a model, with random weights, and its layers detached again."""
    adapters = network.build(model.targets(PARTS))
    for part in adapters.parts:
        for parameter in adapters.parameters_of(part):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    tensors = dict(adapters.adapter_state())
    adapters.detach()
    return tensors


@pytest.mark.parametrize(
    "network", [LierlaConfig(rank=4), C3LierConfig(rank=4, alpha=2.0, conv_rank=2, conv_alpha=1.0)]
)
def test_diffusers_computes_the_same(
    tiny_sdxl_file: Path, tiny_sdxl: Path, network: LoRAConfig, tmp_path: Path
) -> None:
    """A pipeline of diffusers that has loaded the file has W + alpha/rank·U·D in each layer of all three parts."""
    from diffusers import StableDiffusionXLPipeline

    tensors = randomized(built(tiny_sdxl_file), network)
    SafetensorsSaver("fp32").save(AdapterFile(tensors, {}), tmp_path / "lora.safetensors")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    before = {name: dict(getattr(pipeline, name).state_dict()) for name in PARTS}
    before = {part: {name: tensor.clone() for name, tensor in own.items()} for part, own in before.items()}
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipeline.fuse_lora(components=list(PARTS))
    pipeline.unload_lora_weights()
    changed = 0
    for target in built(tiny_sdxl_file).targets(PARTS):
        part, path = target.diffusers_path.split(".", 1)
        modules = dict(getattr(pipeline, part).named_modules())
        path = path if path in modules else path.removeprefix("text_model.")  # of no meaning to transformers 5
        found = modules[path].weight
        if f"{target.key}.lora_up.weight" not in tensors:
            torch.testing.assert_close(found, before[part][f"{path}.weight"], rtol=0, atol=0)
            continue
        up, down = (tensors[f"{target.key}.lora_{way}.weight"].float() for way in ("up", "down"))
        update = (up.flatten(1) @ down.flatten(1)) * (tensors[f"{target.key}.alpha"] / len(down))
        expected = before[part][f"{path}.weight"] + update.view_as(found)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        changed += 1
    assert (
        changed
        == len([name for name in tensors if name.endswith(".alpha")])
        == (986 if isinstance(network, LierlaConfig) else 1052)
    )


def test_starts_from_files_of_diffusers(tiny_sdxl_file: Path, tmp_path: Path) -> None:
    """A file in diffusers' names gives the same tensors as one in sd-scripts'."""
    model = built(tiny_sdxl_file)
    targets, tensors = model.targets(PARTS), randomized(model, LierlaConfig(rank=2, alpha=2.0))
    paths = {target.key: target.diffusers_path for target in targets}
    ends = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    theirs = {
        f"{paths[key]}.{ends[end]}": tensor
        for name, tensor in tensors.items()
        for key, _, end in [name.partition(".")]
        if end in ends
    }
    save_file(theirs, tmp_path / "diffusers.safetensors")
    found = load_initial_weights(tmp_path / "diffusers.safetensors", targets)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].to(found[name].dtype)) for name in tensors)


@pytest.mark.parametrize("network", ["lierla", "c3lier", "dora"])
@pytest.mark.parametrize("parts", [PARTS, ("unet",), ("text_encoder",), ("text_encoder_2",)], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_lowers_the_loss(
    tiny_sdxl_file: Path, network: str, parts: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Steps on one batch lower its loss, whatever is trained, and each trained part moves."""
    config = {
        "lierla": LierlaConfig(rank=4), "c3lier": C3LierConfig(rank=4, conv_rank=2),
        "dora": LierlaConfig(rank=4, dora=True),
    }[network]  # fmt: skip
    torch.manual_seed(0)
    model = built(tiny_sdxl_file, dtype)
    adapters = config.build(model.targets(parts))
    adapters.initialize(0)
    parameters = [parameter for part in adapters.parts for parameter in adapters.parameters_of(part)]
    before = {part: [own.detach().clone() for own in adapters.parameters_of(part)] for part in adapters.parts}
    optimizer, batch = torch.optim.AdamW(parameters, lr=3e-3), make_batch(model)
    losses = []
    for _ in range(4):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert set(adapters.parts) == set(parts)
    for part in adapters.parts:
        moved = [not torch.equal(own, old) for own, old in zip(adapters.parameters_of(part), before[part], strict=True)]
        assert sum(moved) > len(moved) / 3


def tables(path: Path, photographs: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A short run on three photographs."""
    found: dict[str, dict[str, Any]] = {
        "model": {"path": str(path)},
        "data": {"image_dir": str(photographs), "resolution": 64},
        "network": {"rank": 2},
        "training": {"max_steps": 2, "device": "cpu"},
        "output": {"dir": str(out), "name": "xl"},
    }
    return {name: {**found.get(name, {}), **sections.get(name, {})} for name in found.keys() | sections.keys()}


def test_a_rate_for_each_text_encoder(tiny_sdxl_file: Path, photographs: Path, tmp_path: Path) -> None:
    """With 0 for the second one, only the first and the U-Net have adapters; metadata are those that readers act on."""
    rates = {"text_encoder_lr": [1e-3, 0.0], "unet_lr": 1e-3}
    path = lorakit.train(tables(tiny_sdxl_file, photographs, tmp_path / "out", optimizer=rates))
    names = {name.split("_text_model")[0].split("_unet")[0] for name in load_file(path)}
    assert names == {"lora_te1", "lora"}
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_clip_skip": "None",
        "ss_max_token_length": "75",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert "modelspec.encoder_layer" not in metadata


def test_resumed_run_is_exact(tiny_sdxl_file: Path, photographs: Path, tmp_path: Path) -> None:
    """Three steps and one more give the file of four, with both text encoders trained, flips and random crops."""
    data = {"flip_aug": True, "random_crop": True, "caption_dropout_rate": 0.3}
    whole = lorakit.train(tables(tiny_sdxl_file, photographs, tmp_path / "whole", data=data, training={"max_steps": 4}))
    saving = {"save_every_n_steps": 3, "save_state": True}
    lorakit.train(
        tables(tiny_sdxl_file, photographs, tmp_path / "parts", data=data, training={"max_steps": 4}, output=saving)
    )
    again = lorakit.train(
        tables(tiny_sdxl_file, photographs, tmp_path / "parts", data=data, training={"max_steps": 4}, output=saving),
        resume="latest",
    )
    first, second = load_file(whole), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_defaults_of_the_family(tiny_sdxl_file: Path, photographs: Path, tmp_path: Path) -> None:
    """Resolution, buckets and previews suit SDXL where the config does not say them; keys it lacks are refused."""
    own = tables(tiny_sdxl_file, photographs, tmp_path / "out")
    del own["data"]["resolution"]
    own["data"]["enable_bucket"] = True
    config = config_from_tables(own, tmp_path)
    dataset = config.data.datasets[0]
    assert (dataset.resolution, dataset.max_bucket_reso, dataset.bucket_reso_steps) == ((1024, 1024), 2048, 64)
    (job,) = preview_jobs([Prompt(prompt="a cat")], 0, config.model)
    assert (job.width, job.height, job.steps, job.scale, job.sampler.name) == (1024, 1024, 28, 7.0, "euler_a")
    again = config_from_tables(tomlkit.parse(to_toml(config)).unwrap(), tmp_path)
    assert again == config
    own["model"]["clip_skip"] = 2
    with pytest.raises(ConfigError, match=r"model\.clip_skip"):
        config_from_tables(own, tmp_path)
