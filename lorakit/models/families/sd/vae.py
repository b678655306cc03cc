"""The two halves of a VAE: images to the distribution of their latents, and latents to images.

B images, C latent channels, H and W image sides in pixels, h = H/8 and w = W/8 latent sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from lorakit.models.families.sd.checkpoint import CheckpointPart
from lorakit.models.families.sd.infer_config import SCALING_FACTOR
from lorakit.models.families.sd.load import read_module

_LOG_VARIANCE_RANGE = (-30.0, 20.0)


class _Half:
    """One half of a VAE (Kingma & Welling, 2014; Rombach et al., 2022)."""

    def __init__(self, module: nn.Module, scaling_factor: float) -> None:
        self.module = module
        self.scaling_factor = scaling_factor

    @cached_property
    def _exact_module(self) -> nn.Module:
        return copy.deepcopy(self.module).float()

    def _finite(self, compute: Callable[[nn.Module, Tensor], Tensor], given: Tensor) -> Tensor:
        """What `compute` makes of the module and each entry given; in float32 where the number format overflows."""
        computed = compute(self.module, given)
        overflowing = ~computed.flatten(1).isfinite().all(dim=1)
        if overflowing.any():
            computed[overflowing] = compute(self._exact_module, given[overflowing])
        return computed


class VaeEncoder(_Half):
    """The encoder half of a VAE."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, scaled, float32 [B, C, h, w], of images [B, 3, H, W] in [-1, 1].

        Images whose latents overflow the number format are encoded again in float32.
        """
        mean, log_variance = self._finite(_moments, images).chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(*_LOG_VARIANCE_RANGE))
        return mean * self.scaling_factor, deviation * self.scaling_factor


class VaeDecoder(_Half):
    """The decoder half of a VAE."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 [B, 3, H, W] in [-1, 1], of scaled latents [B, C, h, w].

        Those that overflow the number format are decoded again in float32.
        """
        return self._finite(_decoded, latents / self.scaling_factor).clamp(-1, 1)


def _moments(vae: nn.Module, images: Tensor) -> Tensor:
    """Mean and log-variance of the unscaled latents, float32 [B, 2C, h, w]."""
    parameter = next(vae.parameters())
    hidden = vae.get_submodule("encoder")(images.to(parameter.device, parameter.dtype))
    projection = getattr(vae, "quant_conv", None)
    moments: Tensor = hidden if projection is None else projection(hidden)
    return moments.float()


def _decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    """Images, float32 [B, 3, H, W], of unscaled latents."""
    parameter = next(vae.parameters())
    projection = getattr(vae, "post_quant_conv", None)
    hidden = latents.to(parameter.device, parameter.dtype)
    images: Tensor = vae.get_submodule("decoder")(hidden if projection is None else projection(hidden))
    return images.float()


def read_vae_encoder(part: CheckpointPart, device: torch.device, dtype: torch.dtype) -> VaeEncoder:
    """The encoder half of a VAE with its weights, frozen; the decoder's are not read."""
    module = _read_without(("decoder", "post_quant_conv"), part, device, dtype)
    return VaeEncoder(module, part.settings.get("scaling_factor", SCALING_FACTOR))


def read_vae_decoder(part: CheckpointPart, device: torch.device, dtype: torch.dtype) -> VaeDecoder:
    """The decoder half of a VAE with its weights, frozen; the encoder's are not read."""
    module = _read_without(("encoder", "quant_conv"), part, device, dtype)
    return VaeDecoder(module, part.settings.get("scaling_factor", SCALING_FACTOR))


def _read_without(children: Sequence[str], part: CheckpointPart, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return read_module(part, lambda: AutoencoderKL.from_config(dict(part.settings)), device, dtype, without=children)
