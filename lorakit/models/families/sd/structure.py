"""Names and shapes of the tensors that each part's module has, from its settings alone: no module is built.

So `check` can tell an incomplete file from a whole one without importing torch. Names are those of diffusers' and
transformers' modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, pairwise, repeat
from operator import add
from typing import Any

from lorakit.checkpoints import Shapes
from lorakit.models.families.sd.unet_config import Level, UNetConfig

Tensors = Iterator[tuple[str, tuple[int, ...]]]
"""Name and shape of one tensor after the other."""

_VAE_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
_CLIP_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}


def unet_shapes(settings: Mapping[str, Any]) -> Shapes:
    """The tensors of a U-Net with these settings. Raises ValueError for settings that no Stable Diffusion has."""
    return dict(_unet(UNetConfig.of(settings)))


def vae_shapes(settings: Mapping[str, Any]) -> Shapes:
    """The tensors of a VAE with these settings. Raises ValueError for blocks that those of Stable Diffusion lack."""
    all_of = {**_VAE_DEFAULTS, **settings}
    kinds = {*all_of["down_block_types"], *all_of["up_block_types"]} - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    if kinds:
        raise ValueError(f"there are blocks {min(kinds)!r}, which no VAE of Stable Diffusion has")
    return dict(_vae(all_of))


def clip_shapes(settings: Mapping[str, Any]) -> Shapes:
    """The tensors of CLIP's text encoder with these settings."""
    return dict(_clip({**_CLIP_DEFAULTS, **settings}))


def projected_clip_shapes(settings: Mapping[str, Any]) -> Shapes:
    """The tensors of a text encoder with these settings that has a projection of its pooled output."""
    all_of = {**_CLIP_DEFAULTS, **settings}
    return {**dict(_clip(all_of)), "text_projection.weight": (all_of.get("projection_dim", 512), all_of["hidden_size"])}


def _unet(settings: UNetConfig) -> Tensors:
    levels, time = settings.levels, settings.time_channels
    top, bottom = levels[0], levels[-1]
    yield from _conv("conv_in", settings.in_channels, top.channels, 3)
    yield from _linear("time_embedding.linear_1", top.channels, time)
    yield from _linear("time_embedding.linear_2", time, time)
    if settings.added_channels:
        yield from _linear("add_embedding.linear_1", settings.added_channels, time)
        yield from _linear("add_embedding.linear_2", time, time)
    for index, level in enumerate(levels):
        widths = [level.above, *[level.channels] * (level.layers - 1)]
        block = f"down_blocks.{index}"
        yield from _unet_block(block, settings, level, widths, level.layers if level.attends_down else 0)
        if not level.is_bottom:
            yield from _conv(f"{block}.downsamplers.0.conv", level.channels, level.channels, 3)
    if settings.mid_block_type:
        yield from _unet_block("mid_block", settings, bottom, [bottom.channels] * 2, 1)
    for index, level in enumerate(reversed(levels)):
        own = [level.channels] * level.layers
        widths = [*map(add, [level.below, *own], [*own, level.above])]
        block = f"up_blocks.{index}"
        yield from _unet_block(block, settings, level, widths, level.layers + 1 if level.attends_up else 0)
        if not level.is_top:
            yield from _conv(f"{block}.upsamplers.0.conv", level.channels, level.channels, 3)
    yield from _norm("conv_norm_out", top.channels)
    yield from _conv("conv_out", top.channels, settings.out_channels, 3)


def _unet_block(path: str, settings: UNetConfig, level: Level, widths: Iterable[int], transformers: int) -> Tensors:
    """ResNet blocks that take images of these widths, and this number of transformers."""
    for index, width in enumerate(widths):
        yield from _resnet(f"{path}.resnets.{index}", width, level.channels)
        yield from _linear(f"{path}.resnets.{index}.time_emb_proj", settings.time_channels, level.channels)
    for index in range(transformers):
        yield from _transformer(f"{path}.attentions.{index}", settings, level)


def _transformer(path: str, settings: UNetConfig, level: Level) -> Tensors:
    channels = level.channels
    yield from _norm(f"{path}.norm", channels)
    for end in ("proj_in", "proj_out"):
        projection = f"{path}.{end}"
        linear = settings.use_linear_projection
        yield from _linear(projection, channels, channels) if linear else _conv(projection, channels, channels, 1)
    for index in range(level.depth):
        block = f"{path}.transformer_blocks.{index}"
        for attention, context in (("attn1", channels), ("attn2", level.context_channels)):
            yield f"{block}.{attention}.to_q.weight", (channels, channels)
            yield f"{block}.{attention}.to_k.weight", (channels, context)
            yield f"{block}.{attention}.to_v.weight", (channels, context)
            yield from _linear(f"{block}.{attention}.to_out.0", channels, channels)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", channels)
        yield from _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        yield from _linear(f"{block}.ff.net.2", 4 * channels, channels)


def _vae(settings: Mapping[str, Any]) -> Tensors:
    widths, layers, latent = settings["block_out_channels"], settings["layers_per_block"], settings["latent_channels"]
    yield from _conv("encoder.conv_in", settings["in_channels"], widths[0], 3)
    for index, (above, own) in enumerate(pairwise([widths[0], *widths])):
        block = f"encoder.down_blocks.{index}"
        yield from _vae_resnets(block, chain([above], repeat(own, layers - 1)), own)
        if index < len(widths) - 1:
            yield from _conv(f"{block}.downsamplers.0.conv", own, own, 3)
    yield from _vae_ends("encoder", settings, widths[-1], 2 * latent)
    yield from _conv("decoder.conv_in", latent, widths[-1], 3)
    for index, (below, own) in enumerate(pairwise([widths[-1], *reversed(widths)])):
        block = f"decoder.up_blocks.{index}"
        yield from _vae_resnets(block, chain([below], repeat(own, layers)), own)
        if index < len(widths) - 1:
            yield from _conv(f"{block}.upsamplers.0.conv", own, own, 3)
    yield from _vae_ends("decoder", settings, widths[0], settings["out_channels"])
    if settings["use_quant_conv"]:
        yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    if settings["use_post_quant_conv"]:
        yield from _conv("post_quant_conv", latent, latent, 1)


def _vae_resnets(block: str, widths: Iterable[int], outputs: int) -> Tensors:
    for index, width in enumerate(widths):
        yield from _resnet(f"{block}.resnets.{index}", width, outputs)


def _vae_ends(half: str, settings: Mapping[str, Any], width: int, outputs: int) -> Tensors:
    """The middle of a half, as wide as the lowest level, and its last layers, from one width to the outputs."""
    lowest, attention = settings["block_out_channels"][-1], f"{half}.mid_block.attentions.0"
    yield from _vae_resnets(f"{half}.mid_block", [lowest] * 2, lowest)
    if settings["mid_block_add_attention"]:
        yield from _norm(f"{attention}.group_norm", lowest)
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{attention}.{layer}", lowest, lowest)
    yield from _norm(f"{half}.conv_norm_out", width)
    yield from _conv(f"{half}.conv_out", width, outputs, 3)


def _clip(settings: Mapping[str, Any]) -> Tensors:
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    yield "embeddings.token_embedding.weight", (settings["vocab_size"], width)
    yield "embeddings.position_embedding.weight", (settings["max_position_embeddings"], width)
    for index in range(settings["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", width, width)
        yield from _norm(f"{layer}.layer_norm1", width)
        yield from _norm(f"{layer}.layer_norm2", width)
        yield from _linear(f"{layer}.mlp.fc1", width, inner)
        yield from _linear(f"{layer}.mlp.fc2", inner, width)
    yield from _norm("final_layer_norm", width)


def _resnet(path: str, inputs: int, outputs: int) -> Tensors:
    yield from _norm(f"{path}.norm1", inputs)
    yield from _conv(f"{path}.conv1", inputs, outputs, 3)
    yield from _norm(f"{path}.norm2", outputs)
    yield from _conv(f"{path}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{path}.conv_shortcut", inputs, outputs, 1)


def _conv(path: str, inputs: int, outputs: int, side: int) -> Tensors:
    yield f"{path}.weight", (outputs, inputs, side, side)
    yield f"{path}.bias", (outputs,)


def _linear(path: str, inputs: int, outputs: int) -> Tensors:
    yield f"{path}.weight", (outputs, inputs)
    yield f"{path}.bias", (outputs,)


def _norm(path: str, channels: int) -> Tensors:
    yield f"{path}.weight", (channels,)
    yield f"{path}.bias", (channels,)
