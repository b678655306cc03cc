"""The paths that layers have in diffusers and in ComfyUI, for every layer of the real models."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lorakit.checkpoints.lora_names import own_name, own_name_xl
from lorakit.checkpoints.lora_paths import comfyui_path, diffusers_path, layer_shape

FOLDER = Path(__file__).parents[1] / "models"


def layers(model: str) -> list[dict[str, str]]:
    """Key, kind, inputs and kernel of each layer that LoRA files of sd-scripts have for a model."""
    with (FOLDER / f"lora_keys_{model}.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(("model", "encoder"), [("sd15", "clip_l"), ("sd21", "clip_h"), ("sdxl", "clip_l")])
def test_every_key_comes_back(model: str, encoder: str) -> None:
    """The path of each layer is its own, and reading it gives the key again."""
    rename = own_name_xl if model == "sdxl" else own_name
    keys = [row["lora_name"] for row in layers(model)]
    for path_of in (diffusers_path, lambda key: comfyui_path(key, encoder)):
        paths = [path_of(key) for key in keys]
        assert len(set(paths)) == len(keys)
        assert [rename(f"{path}.lora_up.weight") for path in paths] == [f"{key}.lora_up.weight" for key in keys]


@pytest.mark.parametrize(
    ("key", "diffusers", "comfyui"),
    [
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "unet.up_blocks.0.upsamplers.0.conv",
         "diffusion_model.output_blocks.2.1.conv"),
        ("lora_unet_output_blocks_2_2_conv", "unet.up_blocks.0.upsamplers.0.conv",
         "diffusion_model.output_blocks.2.2.conv"),
        ("lora_unet_down_blocks_1_resnets_0_time_emb_proj", "unet.down_blocks.1.resnets.0.time_emb_proj",
         "diffusion_model.input_blocks.4.0.emb_layers.1"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
         "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
         "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0"),
        ("lora_te2_text_model_encoder_layers_3_self_attn_q_proj",
         "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj",
         "text_encoders.clip_g.transformer.text_model.encoder.layers.3.self_attn.q_proj"),
        ("lora_transformer_blocks_0", "", ""),
        ("lora_unet_double_blocks_0_img_attn_qkv", "", ""),
    ],
)  # fmt: skip
def test_known_paths(key: str, diffusers: str, comfyui: str) -> None:
    """Layers whose paths differ most."""
    assert (diffusers_path(key), comfyui_path(key)) == (diffusers, comfyui)


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_shapes_of_layers(model: str) -> None:
    """Whether a layer is linear or a convolution, and of which kernel, is found from its key and its inputs."""
    for row in layers(model):
        kernel = int(row["kernel"])
        expected = (int(row["in"]),) if row["kind"] == "linear" else (int(row["in"]), kernel, kernel)
        found = layer_shape(row["lora_name"], int(row["in"]) * kernel**2, linear_projection=model != "sd15")
        assert found == expected, row["lora_name"]
