"""Kinds of noise; each image has its own generators, so that its noise depends on no other image.

Strengths are drawn, and noise is normalized to unit deviation, for each image; sd-scripts does both once for a whole
batch. C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lorakit.api.loss import LossConfig
from lorakit.utils.rng import RngFactory


def normal(generator: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Independent standard normal numbers, float32."""
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def target_noise(latents: Tensor, loss: LossConfig, generators: RngFactory) -> Tensor:
    """The noise that is mixed into latents [C, h, w] and that is the target, of the same shape."""
    noise = normal(generators("noise"), latents.shape)
    if loss.noise_offset is not None:
        noise += channel_offset(latents, loss, generators("noise offset"))
    if loss.multires_noise_iterations is not None:
        iterations, discount = loss.multires_noise_iterations, loss.multires_noise_discount
        noise = pyramid_noise(noise, iterations, discount, generators("multires noise"))
    return noise


def perturbation(shape: Sequence[int], loss: LossConfig, generator: np.random.Generator) -> Tensor:
    """γ·ε, the noise that is in the model's input only (input perturbation, Ning et al., 2023, arXiv:2301.11706).

    γ is `ip_noise_gamma`, or a draw between 0 and it.
    """
    gamma = (loss.ip_noise_gamma or 0.0) * (generator.random() if loss.ip_noise_gamma_random_strength else 1.0)
    return gamma * normal(generator, shape)


def channel_offset(latents: Tensor, loss: LossConfig, generator: np.random.Generator) -> Tensor:
    """s·ε with one ε for each channel, [C, 1, 1].

    s is `noise_offset`, or a draw between 0 and it; with `adaptive_noise_scale` a, a·|mean of the
    latents' channel| is added in each channel, and the sum is at least 0.
    """
    strength = (loss.noise_offset or 0.0) * (generator.random() if loss.noise_offset_random_strength else 1.0)
    offset = normal(generator, (len(latents), 1, 1))
    if loss.adaptive_noise_scale is None:
        return strength * offset
    means = latents.mean(dim=(1, 2), keepdim=True).abs()
    return (strength + loss.adaptive_noise_scale * means).clamp(min=0) * offset


def pyramid_noise(noise: Tensor, iterations: int, discount: float, generator: np.random.Generator) -> Tensor:
    """Noise [C, h, w] with discountⁱ·ε of lower resolutions added, divided by its standard deviation.

    ε at level i has sides rⁱ times as short, with a new r from [2, 4) at each level, and is resized
    bilinearly. The last level is the first with a side of 1.
    """
    channels, height, width = noise.shape
    total = noise.clone()
    for level in range(iterations):
        ratio = generator.uniform(2, 4) ** level
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = normal(generator, (1, channels, *size))
        total += interpolate(coarse, (height, width), mode="bilinear")[0] * discount**level
        if 1 in size:
            break
    return total / total.std()
