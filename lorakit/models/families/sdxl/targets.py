"""The layers of Stable Diffusion XL that can be adapted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from lorakit.api.components import ModelPart
from lorakit.models.families.sd.targets import block_layers, clip_targets, shared_input, tags_of
from lorakit.models.families.sdxl.parts import (
    LAYOUT,
    UNET,
    block_index,
    original_unet_path,
    text_encoder_key,
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
            shared_input=shared_input(path),
            original_path=f"diffusion_model.{original}",
            other_keys=(f"{UNET.lora_prefix}{path.replace('.', '_')}",),
        )


def text_encoder_targets(part: ModelPart, encoder: nn.Module) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of a text encoder; the last layer's output of the first one is not used."""
    return clip_targets(encoder, part, partial(text_encoder_key, part))
