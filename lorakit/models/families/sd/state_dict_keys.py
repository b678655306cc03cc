"""What the parts of Stable Diffusion 1.x and 2.x are called, and their tensors: in LoRA files and in single files.

All functions take a name in diffusers' module and give the name that the same tensor has elsewhere, so one
table serves reading (look each tensor of a module up) and writing. L is the number of ResNet blocks per level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorakit.api.block_layout import BlockLayout
from lorakit.api.components import ModelPart

UNET = ModelPart(
    "unet",
    title="U-Net",
    lora_prefix="lora_unet_",
    lora_layers=(
        *(f"attn{number}_to_{name}" for number in (1, 2) for name in ("q", "k", "v", "out_0")),
        "ff_net_0_proj",
        "ff_net_2",
        "proj_in",
        "proj_out",
    ),
)
TEXT_ENCODER = ModelPart(
    "text_encoder",
    title="text encoder",
    encoders=(0,),
    lora_prefix="lora_te",
    lora_layers=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
)

LAYER_TAGS = ("transformer", "attention", "mlp", "resnet", "sampler", "conv3x3", "text_encoder")
"""What kinds of layers there are, in the U-Net and in text encoders."""

LAYOUT = BlockLayout(25, {"down": range(12), "mid": range(12, 13), "up": range(13, 25)})
"""As sd-scripts has it: layer j of level i is 1 + 3i + j on the way down and 13 + 3i + j on the way up."""

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
_OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

_UNET_BLOCK = re.compile(r"(down_blocks\.(\d+)|up_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(
    r"(encoder|decoder)\.(down_blocks|up_blocks)\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_FUSED = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def original_unet_name(name: str, settings: Mapping[str, Any]) -> str:
    """The U-Net tensor's name in the original layout, behind `model.diffusion_model.`.

    The settings are the U-Net's: they say which blocks there are.
    """
    match = _UNET_BLOCK.fullmatch(name)
    if match is None:
        return _with_stem(name, _UNET_ENDS)
    _, down, up, kind, index, leaf = match.groups()
    stride = settings["layers_per_block"] + 1
    if kind in {"downsamplers", "upsamplers"}:
        if down is not None:
            return f"input_blocks.{(int(down) + 1) * stride}.0.{leaf.replace('conv', 'op')}"
        slot = 2 if settings["up_block_types"][int(up)].startswith("CrossAttn") else 1
        return f"output_blocks.{int(up) * stride + stride - 1}.{slot}.{leaf}"
    if kind == "resnets":
        leaf = _with_stem(leaf, _UNET_RESNET)
    slot = 0 if kind == "resnets" else 1
    if down is not None:
        return f"input_blocks.{int(down) * stride + int(index) + 1}.{slot}.{leaf}"
    if up is not None:
        return f"output_blocks.{int(up) * stride + int(index)}.{slot}.{leaf}"
    return f"middle_block.{2 * int(index) + slot}.{leaf}"


def original_vae_name(name: str, settings: Mapping[str, Any]) -> str:
    """The VAE tensor's name in the original layout, behind `first_stage_model.`; levels of the decoder count back."""
    if match := _VAE_BLOCK.fullmatch(name):
        half, blocks, level, kind, index, leaf = match.groups()
        place = int(level) if blocks == "down_blocks" else len(settings["block_out_channels"]) - 1 - int(level)
        inner = f"block.{index}" if kind == "resnets" else kind.removesuffix("rs")
        leaf = leaf.replace("conv_shortcut", "nin_shortcut")
        return f"{half}.{blocks.removesuffix('_blocks')}.{place}.{inner}.{leaf}"
    if match := _VAE_MIDDLE.fullmatch(name):
        half, kind, index, leaf = match.groups()
        if kind == "resnets":
            return f"{half}.mid.block_{int(index) + 1}.{leaf}"
        return f"{half}.mid.attn_{int(index) + 1}.{_with_stem(leaf, _VAE_ATTENTION)}"
    return name.replace("conv_norm_out", "norm_out")


def old_vae_name(name: str) -> str:
    """The VAE tensor's name in diffusers' files before 0.17, which called the attention's layers otherwise."""
    match = _VAE_MIDDLE.fullmatch(name)
    if match is None or match[2] != "attentions":
        return name
    return name.removesuffix(match[4]) + _with_stem(match[4], _OLD_VAE_ATTENTION)


def open_clip_name(name: str) -> str:
    """The name in the layout of OpenCLIP, behind `cond_stage_model.model.`, of a tensor of CLIP's text encoder.

    Queries, keys and values are the thirds of one tensor there, `in_proj_weight`; they are called
    `in_proj_weight[0]`, `[1]` and `[2]`.
    """
    if name == "embeddings.position_embedding.weight":
        return "positional_embedding"
    match = _CLIP_LAYER.fullmatch(name)
    if match is None:
        return _with_stem(name, _OPEN_CLIP_ENDS)
    layer, leaf = match.groups()
    if fused := _FUSED.fullmatch(leaf):
        return f"transformer.resblocks.{layer}.attn.in_proj_{fused[2]}[{'qkv'.index(fused[1])}]"
    return f"transformer.resblocks.{layer}.{_with_stem(leaf, _OPEN_CLIP_LAYER)}"


def _with_stem(name: str, table: Mapping[str, str]) -> str:
    """A name without its last step looked up in the table: `conv1.weight` → `in_layers.2.weight`."""
    stem, _, leaf = name.rpartition(".")
    return f"{table.get(stem, stem)}.{leaf}"
