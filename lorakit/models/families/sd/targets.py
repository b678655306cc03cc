"""The layers of Stable Diffusion that can be adapted, and their names in LoRA files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import nn

from lorakit.api.components import ModelPart
from lorakit.models.families.sd.state_dict_keys import LAYOUT, TEXT_ENCODER, UNET
from lorakit.models.interfaces import AdaptationTarget

_BLOCKS = {"attentions": "transformer", "resnets": "resnet", "downsamplers": "sampler", "upsamplers": "sampler"}
_LAYERS = {"attn1": "attention", "attn2": "attention", "self_attn": "attention", "ff": "mlp", "mlp": "mlp"}
_ENCODER_LAYERS = "encoder.layers."
BLOCK_PATH = re.compile(r".*?\b(?:attentions|resnets|downsamplers|upsamplers|layers)\.\d+")
"""Matches the path of a layer up to its transformer, ResNet block, sampler or layer of the text encoder."""


def unet_key(path: str) -> str:
    """The name in LoRA files of a layer, by its path in the U-Net."""
    return f"lora_unet_{path.replace('.', '_')}"


def text_encoder_key(path: str) -> str:
    """The name in LoRA files of a layer, by its path in the text encoder."""
    return f"lora_te_text_model_{path.replace('.', '_')}"


def unet_targets(unet: nn.Module) -> Iterator[AdaptationTarget]:
    """Linear layers and convolutions in the transformers, ResNet blocks and samplers of a U-Net.

    Layers outside of those blocks are left alone: `conv_in`, `conv_out` and the time embedding.
    """
    for path, layer in block_layers(unet):
        side, level, kind, number = path.split(".")[:4]  # `down_blocks.0.resnets.1.conv1`
        block = LAYOUT.groups["mid"].start
        if side != "mid_block":
            first = LAYOUT.groups["up"].start if side == "up_blocks" else 1
            block = first + 3 * int(level) + (2 if _BLOCKS[kind] == "sampler" else int(number))
        yield AdaptationTarget(
            key=unet_key(path),
            part=UNET.name,
            root=unet,
            path=path,
            tags=tags_of(path, layer),
            block_index=block,
            layout=LAYOUT,
            diffusers_path=f"unet.{path}",
            shared_input=shared_input(path),
        )


def text_encoder_targets(encoder: nn.Module) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of the text encoder."""
    return clip_targets(encoder, TEXT_ENCODER, text_encoder_key)


def clip_targets(encoder: nn.Module, part: ModelPart, key: Callable[[str], str]) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of a CLIP text encoder, those above the layer that is read included."""
    for path, layer in _adaptable(encoder):
        if path.startswith(_ENCODER_LAYERS):
            yield AdaptationTarget(
                key=key(path),
                part=part.name,
                root=encoder,
                path=path,
                tags=tags_of(path, layer) | {"text_encoder"},
                encoder_index=part.encoders[0],
                diffusers_path=f"{part.name}.text_model.{path}",
                shared_input=shared_input(path),
            )


def layers_behind(target: AdaptationTarget) -> int:
    """How many layers of its text encoder come behind the one that a target is in."""
    layers = target.root.get_submodule(_ENCODER_LAYERS.rstrip("."))
    return sum(1 for _ in layers.children()) - 1 - int(target.path.removeprefix(_ENCODER_LAYERS).partition(".")[0])


def block_layers(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions in the blocks of a U-Net, by path."""
    return ((path, layer) for path, layer in _adaptable(unet) if _BLOCKS.keys() & {*path.split(".")})


def shared_input(path: str) -> str:
    """The name of what a projection of queries, keys or values reads with others; empty for other layers."""
    attention, _, layer = path.rpartition(".")
    if attention.endswith("attn2"):
        return "encoder_hidden_states" if layer in {"to_k", "to_v"} else ""
    return attention if layer in {"to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj"} else ""


def tags_of(path: str, layer: nn.Module) -> frozenset[str]:
    """What a layer is, from its path and its kernel."""
    tags = {kind for step in path.split(".") for kind in (_BLOCKS.get(step), _LAYERS.get(step)) if kind}
    return frozenset(tags | ({"conv3x3"} if getattr(layer, "kernel_size", None) == (3, 3) else set()))


def _adaptable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each linear layer and convolution by its path, in the order of the module's own list."""
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
