"""The loss of one micro-batch, as the equation has it.

B images in a micro-batch, C latent channels, h and w latent sides. The formulas, and where they come
from, are in `docs/explanation/loss.md`.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.config.loss import LossSection
from lorakit.data.loader import Batch
from lorakit.diffusion.loss import distance, timestep_weights
from lorakit.models.interfaces import Conditioning, DiffusionModel


def denoising_loss(model: DiffusionModel, batch: Batch, conditioning: Conditioning, loss: LossSection) -> Tensor:
    """How far the model is from the noise (or velocity) that was mixed into the latents; a scalar, float32."""
    noisy_latents = model.noise.add_noise(batch.latents, batch.input_noise, batch.timesteps)  # [B, C, h, w]
    prediction = model.predict(noisy_latents, batch.timesteps, conditioning)
    target = model.noise.target(batch.latents, batch.noise, batch.timesteps)  # ε or v
    distances = distance(prediction.float() - target.float(), loss, model.noise, batch.timesteps)
    per_image = batch.masked(distances).flatten(1).mean(dim=1)  # [B]
    return (per_image * batch.weights * timestep_weights(loss, model.noise, batch.timesteps)).mean()
