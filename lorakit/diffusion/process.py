"""What the trainer asks of a noise process, and of the losses and samplers that are built for one.

B images in a micro-batch, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.api.noise import NoiseSpec


class NoiseProcess(Protocol):
    """How noise is mixed into latents, and what the denoiser learns to predict.

    Timesteps are int64 where the process counts steps, and float32 from 0 to 1 where it is continuous.
    """

    @property
    def spec(self) -> NoiseSpec:
        """Its kind, with its settings."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents [B, C, h, w] with noise of the same shape mixed in as of timesteps [B]."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, [B, C, h, w]."""
        ...

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Ratio of the powers of signal and noise, float32 [B]."""
        ...

    def for_loss(self, loss: LossConfig) -> NoiseProcess:
        """The process as `[loss]` asks for it, such as with zero terminal SNR; itself if it asks for nothing."""
        ...


class Loss(Protocol):
    """Compares predictions with their targets."""

    def __call__(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of each number, of the shape of prediction and target, float32 [B, C, h, w]; timesteps are [B]."""
        ...


class TimestepSampler(Protocol):
    """Draws the timesteps that are trained on."""

    def __call__(self, rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
        """The timestep of an image whose latents are [C, h, w]; an integer where the process counts steps."""
        ...


class Predict(Protocol):
    """The guided denoiser, as samplers call it."""

    def __call__(self, noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        """What the denoiser predicts for noisy latents at one timestep, a scalar; float32 [B, C, h, w]."""
        ...


class Sampler(Protocol):
    """Leads from noise to latents."""

    def __call__(self, predict: Predict, noise: Tensor, steps: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents [B, C, h, w], from standard normal noise of that shape; each image has its own generator."""
        ...
