"""Which model a LoRA file is for, by the names that tools write for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.checkpoints import summarize
from lorakit.checkpoints.kinds import adapter_kind

Layers = dict[str, tuple[int, int]]
"""Paths of layers, and their inputs and outputs, a 64th of the true ones where only ratios count."""

FILES: list[tuple[str, str, Layers]] = [
    ("Z-Image", "diffusion_model.layers.0.attention.to_q", {}),
    ("Z-Image", "lora_unet_layers_29_feed_forward_w1", {}),
    ("Z-Image", "lora_unet_layers_0_attention_qkv", {}),
    ("Z-Image", "transformer.layers.0.adaLN_modulation.0", {}),
    ("Z-Image", "diffusion_model.context_refiner.1.attention.out", {}),
    ("Lumina 2", "lora_unet_layers_0_attention_qkv", {"lora_unet_layers_0_attention_out": (2304, 2304)}),
    ("Anima", "diffusion_model.blocks.0.self_attn.q_proj", {}),
    ("Anima", "lora_unet_blocks_0_mlp_layer1", {}),
    ("Anima", "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj", {}),
    ("Krea 2", "diffusion_model.blocks.0.attn.wq", {}),
    ("Krea 2", "base_model.model.blocks.0.attn.wo", {}),
    ("Krea 2", "transformer.transformer_blocks.0.attn.to_gate", {}),
    ("FLUX.1", "lora_unet_double_blocks_0_img_attn_qkv", {"lora_unet_single_blocks_0_modulation_lin": (48, 144)}),
    (
        "FLUX.1",
        "transformer.single_transformer_blocks.0.attn.to_q",
        {"transformer.transformer_blocks.0.norm1_context.linear": (48, 288)},
    ),
    ("FLUX.1 or Chroma", "lora_unet_double_blocks_0_img_attn_proj", {"lora_unet_single_blocks_1_linear1": (48, 336)}),
    ("Chroma", "diffusion_model.distilled_guidance_layer.layers.0.in_layer", {"lora_unet_single_blocks_0_x": (4, 4)}),
    ("FLUX.2", "diffusion_model.double_blocks.0.img_attn.proj", {"diffusion_model.single_blocks.1.linear1": (48, 432)}),
    ("FLUX.2", "lora_unet_double_blocks_0_img_attn_proj", {"lora_unet_double_blocks_0_img_attn_qkv": (4096, 9)}),
    ("FLUX.2", "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", {}),
    ("FLUX.2", "diffusion_model.double_stream_modulation_img.lin", {"diffusion_model.double_blocks.0.x": (4, 4)}),
    ("Qwen-Image", "diffusion_model.transformer_blocks.1.attn.add_q_proj", {}),
    (
        "Qwen-Image",
        "transformer.transformer_blocks.0.attn.to_q",
        {"transformer.transformer_blocks.0.img_mlp.net.2": (4, 4)},
    ),
    (
        "Qwen-Image",
        "lora_unet_transformer_blocks_59_attn_add_q_proj",
        {"lora_unet_transformer_blocks_1_attn_to_q": (4, 4)},
    ),
    ("FLUX.1, Chroma, Stable Diffusion 3 or Qwen-Image", "transformer.transformer_blocks.0.attn.add_q_proj", {}),
    ("Stable Diffusion 3", "lora_unet_joint_blocks_0_x_block_attn_qkv", {}),
    ("Wan", "diffusion_model.blocks.0.self_attn.q", {}),
    ("Stable Diffusion XL", "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", {}),
    ("Stable Diffusion XL", "unet.down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2", {}),
    (
        "Stable Diffusion 1.x",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (768, 320)},
    ),
    ("another kind of model than Stable Diffusion", "base_model.model.model.layers.0.self_attn.o_proj", {}),
]


def written(path: Path, layers: Layers, metadata: dict[str, str] | None = None) -> Path:
    """A LoRA for these layers, in the words that go with its names."""
    tensors = {}
    for layer, (inputs, outputs) in layers.items():
        ends = ("lora_down", "lora_up") if layer.startswith("lora_") else ("lora_A", "lora_B")
        tensors[f"{layer}.{ends[0]}.weight"] = torch.zeros(2, inputs)
        tensors[f"{layer}.{ends[1]}.weight"] = torch.zeros(outputs, 2)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(("model", "layer", "more"), FILES)
def test_names(tmp_path: Path, model: str, layer: str, more: Layers) -> None:
    """The model is told by the names inside, whatever is in front of them."""
    width = 768 if model.endswith("1.x") else 40
    found = adapter_kind(summarize(written(tmp_path / "a.safetensors", {layer: (width, 40), **more})))
    assert found.model == model
    assert found.description == f"a LoRA for {model}"


@pytest.mark.parametrize(
    ("stated", "layer", "model"),
    [
        ({"ss_base_model_version": "chroma"}, "lora_unet_double_blocks_0_img_attn_qkv", "Chroma"),
        (
            {"modelspec.architecture": "Flux.2-klein-4b/lora"},
            "lora_unet_double_blocks_0_img_attn_qkv",
            "FLUX.2",
        ),
        (
            {"modelspec.architecture": "Qwen-Image/lora"},
            "transformer.transformer_blocks.0.attn.add_q_proj",
            "Qwen-Image",
        ),
        ({"ss_base_model_version": "zimage"}, "diffusion_model.blocks.0.attn.wq", "Krea 2"),
        ({"ss_base_model_version": "anima"}, "transformer.transformer_blocks.0.attn1.to_q", "Anima"),
    ],
)
def test_metadata(tmp_path: Path, stated: dict[str, str], layer: str, model: str) -> None:
    """Metadata tell which of several models it is, and never another one than the names."""
    assert adapter_kind(summarize(written(tmp_path / "a.safetensors", {layer: (40, 40)}, stated))).model == model


def test_what_fits(tmp_path: Path) -> None:
    """A file fits each of the models that it may be for; of an unknown one, all but Stable Diffusion."""
    for layer, title, fits in (
        ("lora_unet_double_blocks_0_img_attn_qkv", "Chroma", True),
        ("lora_unet_double_blocks_0_img_attn_qkv", "FLUX.1", True),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Z-Image", False),
        ("diffusion_model.layers.0.attention.to_q", "Z-Image", True),
        ("diffusion_model.layers.0.attention.to_q", "Stable Diffusion XL", False),
        ("diffusion_model.layers.0.attention.to_q", "", True),
        ("transformer.transformer_blocks.0.attn1.to_q", "Anima", True),
        ("transformer.transformer_blocks.0.attn1.to_q", "Stable Diffusion XL", False),
    ):
        kind = adapter_kind(summarize(written(tmp_path / "a.safetensors", {layer: (40, 40)})))
        assert kind.fits(title) == fits, (layer, title)
