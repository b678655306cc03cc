"""Flow matching: latents and noise mixed along straight lines, and a denoiser that predicts their direction.

B images in a micro-batch, C latent channels, h and w latent sides; t the share of noise, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.api.noise import FlowSpec, shifted


class FlowMatching:
    """x_t = (1 − t)·x₀ + t·ε; the target is the velocity ε − x₀ (Lipman et al., 2023, arXiv:2210.02747)."""

    def __init__(self, spec: FlowSpec | None = None) -> None:
        self.spec = spec or FlowSpec()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 − t)·x₀ + t·ε, for latents and noise [B, C, h, w] and timesteps [B]."""
        t = timesteps.view(-1, *[1] * (latents.dim() - 1))
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # noqa: ARG002
        """The velocity ε − x₀, [B, C, h, w], the same at every timestep."""
        return noise - latents

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """((1 − t) / t)², float32 [B]; infinite at 0."""
        return ((1 - timesteps) / timesteps).square()

    def for_loss(self, loss: LossConfig) -> FlowMatching:  # noqa: ARG002
        """Itself: no option of the loss changes it."""
        return self

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Timesteps as the denoiser takes them, 1000·t, float32: bfloat16 would move in steps of 4 above 512."""
        return timesteps.float() * self.spec.timestep_scale

    def sigmas(self, steps: int, latent_shape: Sequence[int]) -> Tensor:
        """The timesteps of a preview of latents [C, h, w], from 1 down to 0, float32 [steps + 1].

        Evenly spaced from 1 to 1/steps, shifted, stretched to end at `shift_terminal`, and then 0.
        """
        sigmas = shifted_sigmas(steps, self.spec.sampling_shift(latent_shape, steps), self.spec.shift_terminal)
        return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def shifted_sigmas(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """The sigmas of `steps` steps without the last 0, float64 [steps]."""
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = shifted(sigmas, shift)  # type: ignore[arg-type, assignment]
    if terminal is not None:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return sigmas
