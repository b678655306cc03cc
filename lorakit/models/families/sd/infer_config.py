"""Settings of a model's parts, inferred from the shapes of their tensors where no config file says them.

The results are the constructor arguments of diffusers' and transformers' modules, which are what config files hold.
For the shapes of Stable Diffusion 1.5 they are that model's published configs; what shapes cannot tell is taken from
there.
Each function raises a `KeyError` with the name of a tensor that should be there and is not.
"""

from __future__ import annotations

import math
import re
from typing import Any

from lorakit.checkpoints import Shapes
from lorakit.models.weights.counting import count

SCALING_FACTOR = 0.18215
"""What latents of the VAEs of Stable Diffusion 1.x and 2.x are multiplied by to get unit variance."""

LATENT_CHANNELS = 4
"""Channels of latents."""

DOWNSCALING = 8
"""How many times smaller than the image's sides the latents' are."""

SD2_TEXT_LAYERS = 23
"""Layers of OpenCLIP's text encoder, 24 in all, that Stable Diffusion 2.x reads."""

_DOWN = re.compile(r"input_blocks\.(\d{1,6})\.0\.op\.weight")
_UP = re.compile(r"output_blocks\.(\d{1,6})\.[12]\.conv\.weight")


def unet_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel` for a U-Net's tensors in original names.

    Attention is not upcast: whether 2.x or 2.1 does not show in the shapes, and backends sum in float32.
    """
    # There are as many blocks on the way up as on the way down, so that either tells what the other lacks.
    inputs = max(count(shapes, "input_blocks.{}.0."), count(shapes, "output_blocks.{}.0."))
    # Blocks of each level, its downsampler included.
    down = [int(found[1]) for name in shapes if (found := _DOWN.fullmatch(name))]
    up = [int(found[1]) + 1 for name in shapes if (found := _UP.fullmatch(name))]
    stride = math.gcd(*down, *up) or max(inputs, 1)
    levels = [f"input_blocks.{index}." for index in range(1, inputs, stride)]
    channels = [shapes[f"{level}0.out_layers.3.weight"][0] for level in levels]
    attentive = [any(name.startswith(f"{level}1.") for name in shapes) for level in levels]
    transformer = f"{levels[attentive.index(True)] if any(attentive) else levels[0]}1."
    linear = len(shapes[f"{transformer}proj_in.weight"]) == 2
    depths = [max(count(shapes, f"{level}1.transformer_blocks.{{}}."), 1) for level in levels]
    sizes = {}
    if added := shapes.get("label_emb.0.0.weight"):
        sizes = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": added[1]}
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": stride - 1,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attentive],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attentive)],
        "transformer_layers_per_block": depths if len({*depths}) > 1 else depths[0],
        "cross_attention_dim": shapes[f"{transformer}transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": [max(channel // 64, 1) for channel in channels] if linear else 8,
        "use_linear_projection": linear,
        "norm_num_groups": math.gcd(32, *channels),
        **sizes,
    }


def vae_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `AutoencoderKL` for a VAE's tensors in original or diffusers' names."""
    is_original = any(name.startswith("encoder.down.") for name in shapes)
    end, block = ("", "block.{}.") if is_original else ("_blocks", "resnets.{}.")
    down, up = f"encoder.down{end}.{{}}.", f"decoder.up{end}.{{}}."
    levels = range(max(count(shapes, down), count(shapes, up)))
    channels = [shapes[f"{down.format(level)}{block.format(0)}conv1.weight"][0] for level in levels]
    # The decoder has one layer more at each level.
    layers = max(count(shapes, down.format(0) + block), count(shapes, up.format(0) + block) - 1)
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "block_out_channels": channels,
        "layers_per_block": layers,
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
        "num_hidden_layers": count(shapes, "encoder.layers.{}."),
        "num_attention_heads": _clip_heads(hidden),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
    }


def sd2_text_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig` for the tensors of OpenCLIP's text encoder, less its last layer.

    Stable Diffusion 2.x reads the last but one. Files of some converters come without the last, so of 23
    layers all are there to be read.
    """
    settings = open_clip_settings(shapes)
    layers = settings["num_hidden_layers"]
    return {**settings, "num_hidden_layers": layers if layers == SD2_TEXT_LAYERS else layers - 1}


def open_clip_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig` for the tensors of OpenCLIP's text encoder."""
    vocabulary, hidden = shapes["token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count(shapes, "transformer.resblocks.{}."),
        "num_attention_heads": _clip_heads(hidden),
        "max_position_embeddings": shapes["positional_embedding"][0],
        "hidden_act": "gelu",
    }


def _clip_heads(hidden: int) -> int:
    """Attention heads of a text encoder of that width: of 64 channels each, or four in a tiny one."""
    return hidden // 64 if hidden % 64 == 0 else 4
