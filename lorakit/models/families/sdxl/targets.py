"""The layers of Stable Diffusion XL that can be adapted."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorakit.models.families.sd.targets import block_layers, clip_targets, tags_of
from lorakit.models.families.sdxl.parts import (
    LAYOUT,
    TEXT_ENCODER_1,
    TEXT_ENCODER_2,
    UNET,
    block_index,
    original_unet_path,
    text_encoder_1_key,
    text_encoder_2_key,
    unet_key,
)
from lorakit.models.interfaces import AdaptationTarget


def unet_targets(unet: nn.Module) -> Iterator[AdaptationTarget]:
    """Linear layers and convolutions in the transformers, ResNet blocks and samplers of a U-Net."""
    for path, layer in block_layers(unet):
        original = original_unet_path(path)
        yield AdaptationTarget(
            key=unet_key(path),
            part=UNET.name,
            root=unet,
            path=path,
            tags=tags_of(path, layer),
            block_index=block_index(original),
            layout=LAYOUT,
            diffusers_path=f"unet.{path}",
            original_path=f"diffusion_model.{original}",
            other_keys=(f"{UNET.lora_prefix}{path.replace('.', '_')}",),
        )


def text_encoder_1_targets(encoder: nn.Module) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of the first text encoder; the last layer's output is not used."""
    return clip_targets(encoder, TEXT_ENCODER_1, text_encoder_1_key)


def text_encoder_2_targets(encoder: nn.Module) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of the second text encoder."""
    return clip_targets(encoder, TEXT_ENCODER_2, text_encoder_2_key)
