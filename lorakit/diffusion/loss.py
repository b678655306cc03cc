"""Losses and their weights by timestep.

B images in a micro-batch, C latent channels, h and w latent sides; t a timestep, SNR its ratio of the
powers of signal and noise. The formulas, and where they come from, are in `docs/explanation/loss.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.api.noise import DDPMSpec
from lorakit.diffusion.process import NoiseProcess

if TYPE_CHECKING:
    from lorakit.api.loss import LossConfig

LARGEST_SNR = 1000.0
"""Cap on ratios in the weights that would otherwise vanish or explode."""


def smooth_l1(difference: Tensor, threshold: Tensor) -> Tensor:
    """2·(√(d²+c²) − c) of differences [B, C, h, w], with the threshold c of each image, [B]."""
    c, square = threshold.view(-1, *[1] * (difference.dim() - 1)), difference.square()
    # √(d²+c²) − c as a quotient: the difference of two close numbers would lose their digits.
    return 2 * square / ((square + c.square()).sqrt() + c)


def huber(difference: Tensor, threshold: Tensor) -> Tensor:
    """2c·(√(d²+c²) − c) of differences [B, C, h, w], with the threshold c of each image, [B]."""
    return threshold.view(-1, *[1] * (difference.dim() - 1)) * smooth_l1(difference, threshold)


def huber_threshold(loss: LossConfig, noise: NoiseProcess, timesteps: Tensor) -> Tensor:
    """The threshold c of each timestep, float32 [B]: `huber_scale` times the value of the schedule.

    constant: huber_c; exponential: huber_c^(t/T); snr: (1 − huber_c)/(1 + σ)² + huber_c, with σ = 1/√SNR.
    """
    if loss.huber_schedule == "constant":
        c = torch.full_like(timesteps, loss.huber_c, dtype=torch.float32)
    elif loss.huber_schedule == "exponential":
        c = torch.exp(timesteps * (math.log(loss.huber_c) / noise.spec.end))
    else:
        root = noise.signal_to_noise(timesteps).sqrt()
        c = (1 - loss.huber_c) * (root / (1 + root)).square() + loss.huber_c
    return loss.huber_scale * c


def timestep_weights(loss: LossConfig, noise: NoiseProcess, timesteps: Tensor) -> Tensor:
    """The weight of each timestep, float32 [B]: the product of what is switched on, for ε and for v.

    min-SNR: min(SNR, γ)/SNR, or min(SNR, γ)/(SNR + 1). With S = min(SNR, 1000), debiased estimation: 1/√S,
    or 1/(S + 1); v-prediction's loss like that of ε: S/(S + 1); with k of the loss that v would have: 1 + k·(S + 1)/S.
    """
    weights = torch.ones_like(timesteps, dtype=torch.float32)
    snr = noise.signal_to_noise(timesteps)
    capped = snr.clamp(max=LARGEST_SNR)
    is_velocity = isinstance(noise.spec, DDPMSpec) and noise.spec.prediction == "v_prediction"
    if loss.min_snr_gamma is not None:
        # For ε written so that it is 1 where there is no signal.
        gamma = loss.min_snr_gamma
        weights *= snr.clamp(max=gamma) / (snr + 1) if is_velocity else (gamma / snr).clamp(max=1)
    if loss.scale_v_pred_loss_like_noise_pred:
        weights *= capped / (capped + 1)
    if loss.v_pred_like_loss is not None:
        weights *= 1 + loss.v_pred_like_loss * (capped + 1) / capped
    if loss.debiased_estimation:
        weights *= 1 / (capped + 1) if is_velocity else capped.rsqrt()
    return weights
