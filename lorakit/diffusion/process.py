"""What a noise process is: how noise is mixed into latents, and what the denoiser learns to predict."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor


class NoiseProcess(Protocol):
    """How noise is mixed into latents, and what the denoiser learns to predict."""

    num_timesteps: int
    prediction: Literal["epsilon", "v_prediction"]
    betas: Tensor
    """Share of the signal's power that each timestep takes away, float64 [T], on the CPU; 1 where none is left."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents [B, C, h, w] with noise of the same shape mixed in as of timesteps [B]."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, [B, C, h, w]."""
        ...

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Ratio of the powers of signal and noise, float32 [B]."""
        ...

    def with_zero_terminal_snr(self) -> NoiseProcess:
        """The same process with no signal left at the last timestep; raises ModelError where there is none."""
        ...
