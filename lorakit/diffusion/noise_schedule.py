"""DDPM: noise in discrete steps, and a denoiser that predicts the noise or the velocity.

B images in a micro-batch, C latent channels, h and w latent sides; t a timestep; ᾱₜ the share of the
signal's power that is left at t.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.api.noise import DDPMSpec

Prediction = Literal["epsilon", "v_prediction"]
"""What the denoiser predicts: the noise ε, or the velocity v = √ᾱ·ε − √(1−ᾱ)·x."""


class DDPMSchedule:
    """The noise of DDPM in discrete steps (Ho et al., 2020, arXiv:2006.11239).

    The schedule is that of latent diffusion models: √β rises linearly from √0.00085 to √0.012
    (Rombach et al., 2022, arXiv:2112.10752). With `zero_terminal_snr`, √ᾱ is shifted and stretched so
    that it starts where it did and ends at zero (Lin et al., 2024, arXiv:2305.08891).
    """

    def __init__(
        self, prediction: Prediction = "epsilon", num_timesteps: int = 1000, *, zero_terminal_snr: bool = False
    ) -> None:
        self.spec = DDPMSpec(num_timesteps=num_timesteps, prediction=prediction)
        self.prediction: Prediction = prediction
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64) ** 2
        signal_power = torch.cumprod(1 - betas, dim=0)
        if zero_terminal_snr:
            signal = signal_power.sqrt()
            signal_power = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
        before = torch.cat([torch.ones_like(signal_power[:1]), signal_power[:-1]])
        self.betas = 1 - signal_power / before
        """βₜ = 1 − ᾱₜ / ᾱₜ₋₁, float64 [T], on the CPU; 1 where no signal is left."""
        ratio = signal_power / (1 - signal_power)
        table = torch.stack([signal_power.sqrt(), (1 - signal_power).sqrt(), ratio]).float()
        self._tables = {torch.device("cpu"): table}

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱₜ·x + √(1−ᾱₜ)·ε, for latents and noise [B, C, h, w] and timesteps [B]."""
        signal, spread = self._factors(timesteps, latents)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, [B, C, h, w]: ε, or v (Salimans & Ho, 2022, arXiv:2202.00512)."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._factors(timesteps, latents)
        return signal * noise - spread * latents

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """ᾱₜ / (1−ᾱₜ), float32 [B], of timesteps [B]."""
        return self._table(timesteps.device)[2][timesteps]

    def for_loss(self, loss: LossConfig) -> DDPMSchedule:
        """The schedule with zero terminal SNR if the loss asks for it, or else itself."""
        return self.with_zero_terminal_snr() if loss.zero_terminal_snr else self

    def with_zero_terminal_snr(self) -> DDPMSchedule:
        """The same process with no signal left at the last timestep."""
        return DDPMSchedule(self.prediction, self.spec.num_timesteps, zero_terminal_snr=True)

    def _factors(self, timesteps: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱₜ and √(1−ᾱₜ), each [B, 1, 1, 1]."""
        shape = (-1, *[1] * (latents.dim() - 1))
        signal, spread = self._table(timesteps.device)[:2, timesteps]
        return signal.view(shape), spread.view(shape)

    def _table(self, device: torch.device) -> Tensor:
        """√ᾱ, √(1−ᾱ) and signal-to-noise ratio at each timestep, float32 [3, T]; copied to a device only once."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]
