"""Settings of a model's parts, inferred from the shapes of their tensors where no config file says them.

The results are the constructor arguments of diffusers' and transformers' modules, which are what config files hold.
For the shapes of Stable Diffusion 1.5 they are that model's published configs; what shapes cannot tell is taken from
there.
Each function raises a `KeyError` with the name of a tensor that should be there and is not.
"""

from __future__ import annotations

import math
from itertools import count
from typing import Any

from lorakit.checkpoints import Shapes

SCALING_FACTOR = 0.18215
"""What latents of the VAEs of Stable Diffusion 1.x and 2.x are multiplied by to get unit variance."""

LATENT_CHANNELS = 4
"""Channels of latents."""

DOWNSCALING = 8
"""How many times smaller than the image's sides the latents' are."""

SD2_TEXT_LAYERS = 23
"""Layers of OpenCLIP's text encoder, 24 in all, that Stable Diffusion 2.x reads."""


def unet_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel` for a U-Net's tensors in original names.

    Attention is not upcast: whether 2.x or 2.1 does not show in the shapes, and backends sum in float32.
    """
    inputs = _length(shapes, "input_blocks.{}.0.")
    stride = next((index for index in range(1, inputs) if f"input_blocks.{index}.0.op.weight" in shapes), inputs)
    levels = [f"input_blocks.{index}." for index in range(1, inputs, stride)]
    channels = [shapes[f"{level}0.out_layers.3.weight"][0] for level in levels]
    attentive = [f"{level}1.norm.weight" in shapes for level in levels]
    transformer = f"{levels[attentive.index(True)] if any(attentive) else levels[0]}1."
    linear = len(shapes[f"{transformer}proj_in.weight"]) == 2
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": stride - 1,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attentive],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attentive)],
        "cross_attention_dim": shapes[f"{transformer}transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": [max(channel // 64, 1) for channel in channels] if linear else 8,
        "use_linear_projection": linear,
        "norm_num_groups": math.gcd(32, *channels),
    }


def vae_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `AutoencoderKL` for a VAE's tensors in original or diffusers' names."""
    is_original = "encoder.down.0.block.0.conv1.weight" in shapes
    level, block = ("encoder.down.{}.", "block.{}.") if is_original else ("encoder.down_blocks.{}.", "resnets.{}.")
    levels = [level.format(index) for index in range(_length(shapes, level))]
    channels = [shapes[f"{level}{block.format(0)}conv1.weight"][0] for level in levels]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "block_out_channels": channels,
        "layers_per_block": _length(shapes, levels[0] + block) if levels else 0,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "norm_num_groups": math.gcd(32, *channels),
        "scaling_factor": SCALING_FACTOR,
    }


def clip_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig` for the tensors of a text encoder of OpenAI's CLIP."""
    vocabulary, hidden = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _length(shapes, "encoder.layers.{}."),
        "num_attention_heads": _clip_heads(hidden),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
    }


def open_clip_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig` for the tensors of OpenCLIP's text encoder, less its last layer.

    Stable Diffusion 2.x reads the last but one. Files of some converters come without the last, so of 23
    layers all are there to be read.
    """
    vocabulary, hidden = shapes["token_embedding.weight"]
    layers = _length(shapes, "transformer.resblocks.{}.")
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": layers if layers == SD2_TEXT_LAYERS else layers - 1,
        "num_attention_heads": _clip_heads(hidden),
        "max_position_embeddings": shapes["positional_embedding"][0],
        "hidden_act": "gelu",
    }


def _clip_heads(hidden: int) -> int:
    """Attention heads of a text encoder of that width: of 64 channels each, or four in a tiny one."""
    return hidden // 64 if hidden % 64 == 0 else 4


def _length(shapes: Shapes, template: str) -> int:
    """How many of `template` with 0, 1, 2, … in it some tensor's name starts with, up to the first gap."""
    before, _, behind = template.partition("{}")
    numbered = (name.removeprefix(before) for name in shapes if name.startswith(before))
    found = {number for number, end, _ in (rest.partition(behind) for rest in numbered) if end}
    return next(index for index in count() if str(index) not in found)
