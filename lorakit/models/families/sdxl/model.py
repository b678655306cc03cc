"""Stable Diffusion XL as the trainer sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from lorakit.api.components import ModelPart
from lorakit.models.base import PartModule
from lorakit.models.conditioning import ImageSizes
from lorakit.models.families.sd.model import StableDiffusion, unet_module
from lorakit.models.families.sd.targets import BLOCK_PATH, layers_behind
from lorakit.models.families.sd.text_encoder import checkpoint_layers, clip_module, set_positions
from lorakit.models.families.sd.unet import BasicTransformerBlock, ResnetBlock2D
from lorakit.models.families.sdxl import parts, targets
from lorakit.models.families.sdxl.text_encoder import (
    SDXLTextEncoder,
    SDXLTokenizer,
    encode_first,
    encode_second,
    join,
    projected_clip_module,
)
from lorakit.models.interfaces import AdaptationTarget, Conditioning, Memo
from lorakit.models.weights.checkpoint import CheckpointPart

_TOKENIZERS = ("tokenizer", "tokenizer_2")
_PADS = (None, 0)
"""What fills captions up: the end token for CLIP, token 0 for OpenCLIP."""


def _text_encoder(part: ModelPart, build: Callable[[CheckpointPart], nn.Module]) -> PartModule:
    """How one of the text encoders is built and treated."""
    return PartModule(
        part=part,
        build=build,
        targets=partial(targets.text_encoder_targets, part),
        key=partial(parts.text_encoder_key, part),
        finish=set_positions,
        checkpoint=checkpoint_layers,
        block_path=BLOCK_PATH,
    )


class StableDiffusionXL(StableDiffusion):
    """A U-Net with image sizes among its inputs, the two halves of a VAE and two text encoders."""

    modules = (
        _text_encoder(parts.TEXT_ENCODER_1, clip_module),
        _text_encoder(parts.TEXT_ENCODER_2, projected_clip_module),
        PartModule(
            part=parts.UNET,
            build=unet_module,
            targets=targets.unet_targets,
            key=parts.unet_key,
            compiled=(ResnetBlock2D, BasicTransformerBlock),
            block_path=parts.SWAPPED_PATH,
        ),
    )

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output, [B, 4, h, w], for noisy latents of that shape, timesteps [B], captions and sizes."""
        context, pooled = (conditioning[name].to(self.dtype) for name in ("hidden_states", "text_embeds"))
        latents = noisy_latents.to(self.dtype)
        prediction: Tensor = self.denoiser(latents, timesteps, context, pooled, conditioning["time_ids"])
        return prediction

    def image_conditioning(self, sizes: Sequence[ImageSizes]) -> Conditioning:
        """`time_ids`, float32 [B, 6]: original size, crop and target size, height and top first.

        They stay in full precision up to their sinusoids: bfloat16 would make 1368 of 1365.
        """
        rows = [(*own.original[::-1], *own.crop[::-1], *own.target[::-1]) for own in sizes]
        return {"time_ids": torch.tensor(rows, dtype=torch.float32)}

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> SDXLTextEncoder:
        """Both text encoders with their tokenizers; a `ModelError` if they do not fit."""
        first, second = (modules[own.part.name] for own in self.modules[:2])
        return SDXLTextEncoder(first, second, self.tokenizer)

    @torch.no_grad()
    def encode_one_by_one(self, batches: Sequence[Sequence[str]], weighted: bool) -> Sequence[Conditioning]:
        """The conditioning of batches of captions, on the CPU, with one text encoder in memory at a time."""
        tokens = [self.tokenizer(captions, weighted) for captions in batches]
        first, second = (own.part.name for own in self.modules[:2])
        module, end = self.module(first), self.tokenizer.second.end
        states = [encode_first(module, own).cpu() for own in tokens]
        del module
        self.free_part(first)
        module = self.module(second)
        encoded = []
        for first_states, own in zip(states, tokens, strict=True):
            second_states, pooled = encode_second(module, own, end)
            encoded.append(join(first_states, second_states.cpu(), pooled.cpu(), own))
        self.free_part(second)
        return encoded

    @cached_property
    def tokenizer(self) -> SDXLTokenizer:
        """The tokenizers; a `ModelError` if they do not fit the text encoders."""
        encoders = zip(self.modules, _TOKENIZERS, _PADS, strict=False)
        return SDXLTokenizer(*(self.read_tokenizer(own.part.name, folder, pad) for own, folder, pad in encoders))

    def reads(self, target: AdaptationTarget) -> bool:
        """False for the last layer of the first text encoder: that of the second makes the pooled captions."""
        return target.part != parts.TEXT_ENCODER_1.name or layers_behind(target) >= 1

    def text_options(self, memo: Memo) -> list[object]:
        """What captions are encoded with, and hashes of the model's own tokenizers; empty where it uses CLIP's."""
        return [self.variant.max_token_length, self.tokenizer_hashes(memo, *_TOKENIZERS), *self.cleaning]
