"""The timestep samplers: uniform, and those that prefer the middle."""

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


@frozen(kw_only=True)
class ModeConfig(TimestepSamplerConfig):
    """Timesteps in the middle more likely, those at both ends still drawn (Esser et al., 2024, arXiv:2403.03206)."""

    name = "mode"

    mode_scale: float = field(default=1.29, validator=[v.ge(-1.0), v.le(1.75)])
    """How much more likely the middle is; 0 draws uniformly, below 0 the ends are more likely."""

    def build(self, noise_process: NoiseProcess) -> TimestepSampler:
        """The function that draws."""

        def sample(rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
            u = rng.random()
            fraction = 1 - u - self.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
            return self.timestep(fraction, noise_process.spec, latent_shape)

        return sample


@frozen(kw_only=True)
class CosmapConfig(TimestepSamplerConfig):
    """Density 2/(π(1 − 2t + 2t²)): in the middle twice as likely as at the ends (Esser et al., 2024)."""

    name = "cosmap"

    def build(self, noise_process: NoiseProcess) -> TimestepSampler:
        """The function that draws."""

        def sample(rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
            # 1 − 1/(tan(πu/2) + 1), without the pole.
            sine, cosine = math.sin(math.pi * (u := rng.random()) / 2), math.cos(math.pi * u / 2)
            return self.timestep(sine / (sine + cosine), noise_process.spec, latent_shape)

        return sample


@hookimpl
def register_timestep_samplers() -> list[type[TimestepSamplerConfig]]:
    """All of them."""
    return [UniformConfig, LogitNormalConfig, ModeConfig, CosmapConfig]
