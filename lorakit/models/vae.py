"""The two halves of diffusers' AutoencoderKL: images to the distribution of their latents, and latents to images.

Latents are scaled as the part's settings say: z = (x − shift_factor)·scaling_factor.

B images, C latent channels, H and W image sides in pixels, h = H/8 and w = W/8 latent sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorakit.models.weights.checkpoint import CheckpointPart, Settings
from lorakit.models.weights.modules import read_module

_LOG_VARIANCE_RANGE = (-30.0, 20.0)


class _Half:
    """One half of a VAE (Kingma & Welling, 2014; Rombach et al., 2022)."""

    def __init__(self, module: nn.Module, scaling_factor: float | Tensor, shift_factor: float | Tensor = 0.0) -> None:
        """Its module, and what scales latents: one number, or one for each channel, [C, 1, 1]."""
        self.module = module
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self._exact: nn.Module | None = None

    def _finite(self, compute: Callable[[nn.Module, Tensor], Tensor], given: Tensor) -> Tensor:
        """What `compute` makes of the module and each entry given; in float32 where float16 overflows."""
        computed = compute(self.module, given)
        # Other formats have the range of float32, and to ask would let the host wait for the device.
        if next(self.module.parameters()).dtype != torch.float16:
            return computed
        overflowing = ~computed.flatten(1).isfinite().all(dim=1)
        if overflowing.any():
            self._exact = self._exact or copy.deepcopy(self.module).float()
            computed[overflowing] = compute(self._exact, given[overflowing])
        return computed


class VaeEncoder(_Half):
    """The encoder half of a VAE."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, scaled, float32 [B, C, h, w], of images [B, 3, H, W] in [-1, 1].

        Images whose latents overflow float16 are encoded again in float32.
        """
        mean, log_variance = self._finite(_moments, images).chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(*_LOG_VARIANCE_RANGE))
        mean = (mean - self.shift_factor) * self.scaling_factor
        return mean, deviation * self.scaling_factor


class VaeDecoder(_Half):
    """The decoder half of a VAE."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 [B, 3, H, W] in [-1, 1], of scaled latents [B, C, h, w].

        Those that overflow float16 are decoded again in float32.
        """
        return self._finite(_decoded, latents / self.scaling_factor + self.shift_factor).clamp(-1, 1)


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
    module = read_module(part, _autoencoder, device, dtype, without=("decoder", "post_quant_conv"))
    return VaeEncoder(module, *_scale_and_shift(part.settings))


def read_vae_decoder(part: CheckpointPart, device: torch.device, dtype: torch.dtype) -> VaeDecoder:
    """The decoder half of a VAE with its weights, frozen; the encoder's are not read."""
    module = read_module(part, _autoencoder, device, dtype, without=("encoder", "quant_conv"))
    return VaeDecoder(module, *_scale_and_shift(part.settings))


def _scale_and_shift(settings: Settings) -> tuple[float, float]:
    # diffusers' default, which is that of Stable Diffusion 1.x and 2.x.
    return settings.get("scaling_factor", 0.18215), settings.get("shift_factor") or 0.0


def _autoencoder(part: CheckpointPart) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    module: nn.Module = AutoencoderKL.from_config(dict(part.settings))
    return module
