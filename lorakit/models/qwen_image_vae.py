"""The two halves of Qwen-Image's VAE, for single images.

Latents are scaled per channel: z = (x − mean) / std. Images get the mode of their latents' distribution, as in all
trainers and pipelines of this VAE.

B images, C latent channels, H and W image sides in pixels, h = H/8 and w = W/8 latent sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.models import vae
from lorakit.models.qwen_image_vae_files import LATENTS_MEAN, LATENTS_STD
from lorakit.models.weights.checkpoint import CheckpointPart, Settings
from lorakit.models.weights.modules import read_module


class QwenImageVaeEncoder(vae.VaeEncoder):
    """The encoder half."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Modes of the scaled latents, and zeros, float32 [B, C, h, w], of images [B, 3, H, W] in [-1, 1].

        Images whose latents overflow float16 are encoded again in float32.
        """
        mode = (self._finite(_mode, images) - self.shift_factor) * self.scaling_factor
        return mode, torch.zeros_like(mode)


class QwenImageVaeDecoder(vae.VaeDecoder):
    """The decoder half."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 [B, 3, H, W] in [-1, 1], of scaled latents [B, C, h, w].

        Those that overflow float16 are decoded again in float32.
        """
        latents = latents.to(next(self.module.parameters()).device)
        return self._finite(_decoded, latents / self.scaling_factor + self.shift_factor).clamp(-1, 1)


def read_qwen_image_vae_encoder(part: CheckpointPart, device: torch.device, dtype: torch.dtype) -> QwenImageVaeEncoder:
    """The encoder half with its weights, frozen; the decoder's are not read."""
    module = read_module(part, _autoencoder, device, dtype, without=("decoder", "post_quant_conv"))
    return QwenImageVaeEncoder(_for_images(module), *_scale_and_shift(part.settings, device))


def read_qwen_image_vae_decoder(part: CheckpointPart, device: torch.device, dtype: torch.dtype) -> QwenImageVaeDecoder:
    """The decoder half with its weights, frozen; the encoder's are not read."""
    module = read_module(part, _autoencoder, device, dtype, without=("encoder", "quant_conv"))
    return QwenImageVaeDecoder(_for_images(module), *_scale_and_shift(part.settings, device))


def _mode(module: nn.Module, images: Tensor) -> Tensor:
    """Unscaled latents, float32 [B, C, h, w], of images."""
    moments = _applied(module, ("encoder", "quant_conv"), images)
    return moments.chunk(2, dim=1)[0]


def _decoded(module: nn.Module, latents: Tensor) -> Tensor:
    """Images, float32 [B, 3, H, W], of unscaled latents."""
    return _applied(module, ("post_quant_conv", "decoder"), latents)


def _applied(module: nn.Module, names: tuple[str, str], image: Tensor) -> Tensor:
    """What two children of a module make one after the other of an image as a video of one frame; float32."""
    parameter = next(module.parameters())
    video = image.to(parameter.device, parameter.dtype).unsqueeze(2)
    for name in names:
        video = module.get_submodule(name)(video)
    return video.squeeze(2).float()


def _for_images(module: nn.Module) -> nn.Module:
    """The module without the weights that see other frames than one: they would see zeros, or nothing at all."""
    for owner in list(module.modules()):
        if hasattr(owner, "time_conv"):
            del owner.time_conv
    convs: list[Any] = [conv for conv in module.modules() if isinstance(conv, nn.Conv3d)]
    for conv in convs:
        # It sees frames up to the current one, which is the last, and pads with others.
        conv.weight = nn.Parameter(conv.weight[:, :, -1:].clone(), requires_grad=False)
        conv.kernel_size = (1, *conv.kernel_size[1:])
        conv._padding = (*conv._padding[:4], 0, 0)
    return module


def _scale_and_shift(settings: Settings, device: torch.device) -> tuple[Tensor, Tensor]:
    """What latents are multiplied by, and what is subtracted before that, float32 [C, 1, 1]."""
    mean, std = settings.get("latents_mean", LATENTS_MEAN), settings.get("latents_std", LATENTS_STD)
    shift, spread = (torch.tensor(own, dtype=torch.float32, device=device).view(-1, 1, 1) for own in (mean, std))
    return 1 / spread, shift


def _autoencoder(part: CheckpointPart) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    module: nn.Module = AutoencoderKLQwenImage.from_config(dict(part.settings))
    return module
