"""The loss of denoising: how far the model is from what was mixed into the latents."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.config.sections import LossSection
from lorakit.data.batches import Batch
from lorakit.models.protocol import Conditioning, DiffusionModel, NoiseProcess


def denoising_loss(model: DiffusionModel, batch: Batch, conditioning: Conditioning, loss: LossSection) -> Tensor:
    """How far the model is from the noise (or velocity) that was mixed into the latents; a scalar, float32."""
    noisy_latents = model.noise.add_noise(batch.latents, batch.noise, batch.timesteps)  # [B, C, h, w]
    prediction = model.predict(noisy_latents, batch.timesteps, conditioning)
    target = model.noise.target(batch.latents, batch.noise, batch.timesteps)  # ε or v
    per_image = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)  # [B]
    return (per_image * batch.weights * timestep_weights(loss, model.noise, batch.timesteps)).mean()


def timestep_weights(loss: LossSection, noise: NoiseProcess, timesteps: Tensor) -> Tensor:
    """How much each timestep counts, float32 [B]; min-SNR: min(SNR, γ) / SNR, for v-prediction / (SNR + 1)."""
    if loss.min_snr_gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = noise.signal_to_noise(timesteps)
    return snr.clamp(max=loss.min_snr_gamma) / (snr + 1 if noise.prediction == "v_prediction" else snr)
