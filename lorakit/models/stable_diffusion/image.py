"""The image encoder: images to the distribution of their latents.

B images, C latent channels, H and W image sides in pixels, h = H/8 and w = W/8 latent sides.
"""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import Tensor, nn

from lorakit.models.stable_diffusion.parts import StoredPart
from lorakit.models.stable_diffusion.reading import read_module
from lorakit.models.stable_diffusion.settings import SCALING_FACTOR

_LOG_VARIANCE_RANGE = (-30.0, 20.0)


class VaeEncoder:
    """The encoder half of a VAE (Kingma & Welling, 2014; Rombach et al., 2022)."""

    def __init__(self, module: nn.Module, scaling_factor: float) -> None:
        self.module = module
        self.scaling_factor = scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, scaled, float32 [B, C, h, w], of images [B, 3, H, W] in [-1, 1].

        Images whose latents overflow the number format are encoded again in float32.
        """
        moments = _moments(self.module, images)
        overflowing = ~moments.flatten(1).isfinite().all(dim=1)
        if overflowing.any():
            moments[overflowing] = _moments(self._exact_module, images[overflowing])
        mean, log_variance = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(*_LOG_VARIANCE_RANGE))
        return mean * self.scaling_factor, deviation * self.scaling_factor

    @cached_property
    def _exact_module(self) -> nn.Module:
        return copy.deepcopy(self.module).float()


def _moments(vae: nn.Module, images: Tensor) -> Tensor:
    """Mean and log-variance of the unscaled latents, float32 [B, 2C, h, w]."""
    parameter = next(vae.parameters())
    hidden = vae.get_submodule("encoder")(images.to(parameter.device, parameter.dtype))
    projection = getattr(vae, "quant_conv", None)
    moments: Tensor = hidden if projection is None else projection(hidden)
    return moments.float()


def read_vae_encoder(part: StoredPart, device: torch.device, dtype: torch.dtype) -> VaeEncoder:
    """The encoder half of a VAE with its weights, frozen; the decoder's are not read."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    decoder = ("decoder", "post_quant_conv")
    module = read_module(part, lambda: AutoencoderKL.from_config(dict(part.settings)), device, dtype, without=decoder)
    return VaeEncoder(module, part.settings.get("scaling_factor", SCALING_FACTOR))
