"""The loss of one micro-batch, as the equation has it.

B images in a micro-batch, C latent channels, h and w latent sides. The formulas, and where they come
from, are in `docs/explanation/loss.md`.
"""

from __future__ import annotations

from attrs import frozen
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.data.loader import Batch
from lorakit.diffusion.loss import timestep_weights
from lorakit.diffusion.process import Loss, NoiseProcess
from lorakit.models.interfaces import Conditioning, DiffusionModel
from lorakit.plugins.build import build_component


@frozen
class Criterion:
    """The loss of a run, built for the noise process of its model."""

    compare: Loss
    """Compares predictions with targets."""
    config: LossConfig
    """The weights of timesteps."""

    @classmethod
    def of(cls, config: LossConfig, noise: NoiseProcess) -> Criterion:
        """The loss that a config asks for. Raises PluginError where it cannot be built."""
        return cls(build_component(config, noise), config)


def denoising_loss(model: DiffusionModel, batch: Batch, conditioning: Conditioning, criterion: Criterion) -> Tensor:
    """How far the model is from the noise (or velocity) that was mixed into the latents; a scalar, float32."""
    noisy_latents = model.noise.add_noise(batch.latents, batch.input_noise, batch.timesteps)  # [B, C, h, w]
    prediction = model.predict(noisy_latents, batch.timesteps, conditioning)
    target = model.noise.target(batch.latents, batch.noise, batch.timesteps)  # ε, v or ε − x₀
    losses = criterion.compare(prediction.float(), target.float(), batch.timesteps)
    per_image = batch.masked(losses).flatten(1).mean(dim=1)  # [B]
    return (per_image * batch.weights * timestep_weights(criterion.config, model.noise, batch.timesteps)).mean()
