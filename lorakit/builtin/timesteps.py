"""The timestep samplers: uniform and logit-normal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.hookspecs import hookimpl
from lorakit.api.sampling import TimestepSamplerConfig

if TYPE_CHECKING:
    import numpy as np

    from lorakit.diffusion.process import NoiseProcess, TimestepSampler


@frozen(kw_only=True)
class UniformConfig(TimestepSamplerConfig):
    """All timesteps equally likely."""

    name = "uniform"

    def build(self, noise_process: NoiseProcess) -> TimestepSampler:
        """The function that draws."""
        spec, (low, high) = noise_process.spec, self.bounds(noise_process.spec)

        def sample(rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
            if spec.num_timesteps and self.shift is None and spec.training_shift(latent_shape) == 1:
                return int(rng.integers(int(low), int(high)))
            return self.timestep(rng.random(), spec, latent_shape)

        return sample


@frozen(kw_only=True)
class LogitNormalConfig(TimestepSamplerConfig):
    """Timesteps in the middle more likely: t = 1/(1 + exp(-n)), n normal (Esser et al., 2024, arXiv:2403.03206)."""

    name = "logit_normal"

    mean: float = 0.0
    """Mean of n; above 0 for more noise."""
    std: float = field(default=1.0, validator=v.gt(0))
    """Standard deviation of n; smaller values stay closer to the mean."""

    def build(self, noise_process: NoiseProcess) -> TimestepSampler:
        """The function that draws."""

        def sample(rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
            # As tanh, because exp(-n) overflows.
            fraction = 0.5 + 0.5 * math.tanh((self.mean + self.std * rng.standard_normal()) / 2)
            return self.timestep(fraction, noise_process.spec, latent_shape)

        return sample


@hookimpl
def register_timestep_samplers() -> list[type[TimestepSamplerConfig]]:
    """Both."""
    return [UniformConfig, LogitNormalConfig]
