"""The layers of Stable Diffusion that can be adapted, and their names in LoRA files."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorakit.models.protocol import AdaptationTarget, Block

_BLOCKS: dict[str, Block] = {
    "attentions": "transformer",
    "resnets": "resnet",
    "downsamplers": "sampler",
    "upsamplers": "sampler",
}


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
    for path, parent, attribute in _adaptable(unet):
        block = next((_BLOCKS[step] for step in path.split(".") if step in _BLOCKS), None)
        if block is not None:
            yield AdaptationTarget(unet_key(path), "unet", block, parent, attribute, f"unet.{path}")


def text_encoder_targets(encoder: nn.Module) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of a CLIP text encoder, those above the layer that is read included."""
    for path, parent, attribute in _adaptable(encoder):
        key, place = text_encoder_key(path), f"text_encoder.text_model.{path}"
        yield AdaptationTarget(key, "text_encoder", "text_encoder", parent, attribute, place)


def _adaptable(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, parent and attribute of each linear layer and convolution, in the order of the module's own list."""
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parent, _, attribute = path.rpartition(".")
            yield path, module.get_submodule(parent), attribute
