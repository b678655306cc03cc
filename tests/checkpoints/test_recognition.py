"""What checkpoints are said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints import CheckpointSummary, describe, traits_of

TEXT = "cond_stage_model.transformer."
UNET = "model.diffusion_model."
ATTENTION = f"{UNET}input_blocks.1.1."
CLIP = "text_model.encoder.layers.0.mlp.fc1.weight"
OPEN_CLIP = "transformer.resblocks.0.mlp.c_fc.weight"


def single_file(context: int, *others: str, channels: int = 4, linear: bool = False) -> CheckpointSummary:
    """A summary with the tensors that tell models apart, shaped as in the full-size models."""
    tensors: dict[str, tuple[int, ...]] = {
        f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{ATTENTION}proj_in.weight": (320, 320) if linear else (320, 320, 1, 1),
        f"{ATTENTION}transformer_blocks.0.attn2.to_k.weight": (320, context),
        **dict.fromkeys(others, (1, 1)),
    }
    return CheckpointSummary(Path("x.safetensors"), "safetensors", tensors)


def tensors(*names: str) -> CheckpointSummary:
    """A summary of a file with tensors of these names."""
    return CheckpointSummary(Path("x.safetensors"), "safetensors", dict.fromkeys(names, (1, 1)))


def folder(index: dict[str, Any], **configs: Any) -> CheckpointSummary:
    """A summary of a folder with this `model_index.json` and these configs."""
    return CheckpointSummary(Path("x"), "folder", configs={"model_index": index, **configs})


SD1_UNET = {"in_channels": 4, "cross_attention_dim": 768}
SD2_UNET = {"in_channels": 4, "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL_UNET = {"cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time"}
ONE_ENCODER = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
TWO_ENCODERS = {**ONE_ENCODER, "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}


@pytest.mark.parametrize(
    ("summary", "description"),
    [
        (single_file(768, TEXT + CLIP), "a Stable Diffusion 1.x model"),
        (single_file(768, f"{TEXT}encoder.layers.0.mlp.fc1.weight"), "a Stable Diffusion 1.x model"),
        (single_file(768, TEXT + CLIP, channels=9), "a Stable Diffusion 1.x inpainting model"),
        (single_file(1024, f"cond_stage_model.model.{OPEN_CLIP}", linear=True), "a Stable Diffusion 2.x model"),
        (
            single_file(
                2048,
                f"conditioner.embedders.0.transformer.{CLIP}",
                f"conditioner.embedders.1.model.{OPEN_CLIP}",
                f"{UNET}label_emb.0.0.weight",
                linear=True,
            ),
            "a Stable Diffusion XL model",
        ),
        (folder(ONE_ENCODER, unet=SD1_UNET), "a Stable Diffusion 1.x model"),
        (folder(ONE_ENCODER, unet=SD2_UNET), "a Stable Diffusion 2.x model"),
        (folder(TWO_ENCODERS, unet=SDXL_UNET), "a Stable Diffusion XL model"),
        (folder({"_class_name": "FluxPipeline"}), "a model for diffusers' FluxPipeline"),
        (single_file(768), "a U-Net without a text encoder"),
        (tensors("lora_unet_x.lora_down.weight"), "a LoRA file, not a base model"),
        (tensors("encoder.down.0.block.0.conv1.weight"), "a VAE alone"),
        (tensors("double_blocks.0.x"), "a FLUX model"),
        (tensors("x"), "a file of an unknown kind of model"),
        (tensors(), "a file without tensors"),
    ],
)  # fmt: skip
def test_models_are_described(summary: CheckpointSummary, description: str) -> None:
    """Each kind of model is called what users call it."""
    assert describe(summary) == description


def test_traits_of_xl_list_both_encoders() -> None:
    """Text encoders are told apart by place and by the library whose layout they have."""
    summary = single_file(
        2048, f"conditioner.embedders.0.transformer.{CLIP}", f"conditioner.embedders.1.model.{OPEN_CLIP}", linear=True
    )
    traits = traits_of(summary)
    assert traits is not None
    assert (traits.text_encoders, traits.context_dim) == (("clip", "open_clip"), 2048)
