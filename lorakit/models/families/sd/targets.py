"""The layers of Stable Diffusion that can be adapted, and their names in LoRA files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from torch import nn

from lorakit.api.block_layout import STABLE_DIFFUSION
from lorakit.models.interfaces import AdaptationTarget, Block
from lorakit.models.memory.activation_checkpointing import CheckpointedBlock

_BLOCKS: dict[str, Block] = {
    "attentions": "transformer",
    "resnets": "resnet",
    "downsamplers": "sampler",
    "upsamplers": "sampler",
}

_BLOCK_PATH = re.compile(r".*?\b(?:attentions|resnets|downsamplers|upsamplers|layers)\.\d+")


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
    for path in _adaptable(unet):
        block = next((_BLOCKS[step] for step in path.split(".") if step in _BLOCKS), None)
        if block is not None:
            yield AdaptationTarget(
                unet_key(path), "unet", block, unet, path, _block_number(path), STABLE_DIFFUSION, f"unet.{path}"
            )


def unet_blocks(unet: nn.Module) -> list[CheckpointedBlock]:
    """The ResNet and transformer blocks of a U-Net."""
    return [module for module in unet.modules() if isinstance(module, CheckpointedBlock)]


def text_encoder_targets(encoder: nn.Module) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of a CLIP text encoder, those above the layer that is read included."""
    for path in _adaptable(encoder):
        key, place = text_encoder_key(path), f"text_encoder.text_model.{path}"
        yield AdaptationTarget(key, "text_encoder", "text_encoder", encoder, path, place=place)


def layers_by_block(targets: Iterable[AdaptationTarget]) -> list[list[nn.Module]]:
    """The layers of a part, those together that are used together: of each transformer, ResNet block, and so on."""

    def block(target: AdaptationTarget) -> str:
        found = _BLOCK_PATH.match(target.path)
        return found[0] if found else target.path

    return [[target.module for target in own] for _, own in groupby(targets, block)]


def _block_number(path: str) -> int:
    """The number of the block that a layer of the U-Net is in, by its path: `down_blocks.0.resnets.1.conv1`."""
    side, level, kind, layer = path.split(".")[:4]
    if side == "mid_block":
        return STABLE_DIFFUSION.mid.start
    first = STABLE_DIFFUSION.up.start if side == "up_blocks" else STABLE_DIFFUSION.down.start + 1
    return first + 3 * int(level) + (2 if _BLOCKS[kind] == "sampler" else int(layer))


def _adaptable(module: nn.Module) -> Iterator[str]:
    """Path of each linear layer and convolution, in the order of the module's own list."""
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield path
