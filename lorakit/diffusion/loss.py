"""Losses and their weights by timestep.

B images in a micro-batch, C latent channels, h and w latent sides; t a timestep, SNR its ratio of the
powers of signal and noise. The formulas, and where they come from, are in `docs/explanation/loss.md`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorakit.config.loss import LossSection
from lorakit.diffusion.process import NoiseProcess

LARGEST_SNR = 1000.0
"""Ratios above this count as this in the weights that would otherwise vanish or explode."""


def distance(difference: Tensor, loss: LossSection, noise: NoiseProcess, timesteps: Tensor) -> Tensor:
    """What each number's difference d from its target costs, of the shape of `difference`, [B, C, h, w].

    l2: d²; l1: |d|; huber: 2c·(√(d²+c²) − c); smooth_l1: 2·(√(d²+c²) − c), with the threshold c of each timestep.
    """
    if loss.type == "l1":
        return difference.abs()
    square = difference.square()
    if loss.type == "l2":
        return square
    c = huber_threshold(loss, noise, timesteps).view(-1, *[1] * (difference.dim() - 1))
    # √(d²+c²) − c as a quotient: the difference of two close numbers would lose their digits.
    smooth_l1 = 2 * square / ((square + c.square()).sqrt() + c)
    return c * smooth_l1 if loss.type == "huber" else smooth_l1


def huber_threshold(loss: LossSection, noise: NoiseProcess, timesteps: Tensor) -> Tensor:
    """The threshold c of each timestep, float32 [B]: `huber_scale` times what the schedule says.

    constant: huber_c; exponential: huber_c^(t/T); snr: (1 − huber_c)/(1 + σ)² + huber_c, with σ = 1/√SNR.
    """
    if loss.huber_schedule == "constant":
        c = torch.full_like(timesteps, loss.huber_c, dtype=torch.float32)
    elif loss.huber_schedule == "exponential":
        c = torch.exp(timesteps * (math.log(loss.huber_c) / noise.num_timesteps))
    else:
        root = noise.signal_to_noise(timesteps).sqrt()
        c = (1 - loss.huber_c) * (root / (1 + root)).square() + loss.huber_c
    return loss.huber_scale * c


def timestep_weights(loss: LossSection, noise: NoiseProcess, timesteps: Tensor) -> Tensor:
    """How much each timestep counts, float32 [B]: the product of what is switched on, for ε and for v.

    min-SNR: min(SNR, γ)/SNR, or min(SNR, γ)/(SNR + 1). With S = min(SNR, 1000), debiased estimation: 1/√S,
    or 1/(S + 1); v-prediction's loss like that of ε: S/(S + 1); with k of the loss that v would have: 1 + k·(S + 1)/S.
    """
    weights = torch.ones_like(timesteps, dtype=torch.float32)
    snr = noise.signal_to_noise(timesteps)
    capped = snr.clamp(max=LARGEST_SNR)
    is_velocity = noise.prediction == "v_prediction"
    if loss.min_snr_gamma is not None:
        weights *= _min_snr(snr, loss.min_snr_gamma, is_velocity=is_velocity)
    if loss.scale_v_pred_loss_like_noise_pred:
        weights *= capped / (capped + 1)
    if loss.v_pred_like_loss is not None:
        weights *= 1 + loss.v_pred_like_loss * (capped + 1) / capped
    if loss.debiased_estimation:
        weights *= 1 / (capped + 1) if is_velocity else capped.rsqrt()
    return weights


def _min_snr(snr: Tensor, gamma: float, *, is_velocity: bool) -> Tensor:
    if is_velocity:
        return snr.clamp(max=gamma) / (snr + 1)
    # min(SNR, γ)/SNR, written so that it is 1 where there is no signal.
    return (gamma / snr).clamp(max=1)
