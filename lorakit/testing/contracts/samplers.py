"""What every sampler of previews must do.

B images, C latent channels, h and w latent sides.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from lorakit.api.components import ObserverConfig
from lorakit.api.noise import DDPMSpec, FlowSpec
from lorakit.api.sampling import SamplerConfig
from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.diffusion.flow import FlowMatching
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.diffusion.process import NoiseProcess, Predict
from lorakit.plugins.catalog import Catalog
from lorakit.testing.contracts.component import ComponentContract

SHAPE = (2, 4, 8, 8)
DATA = 0.5
"""The only number that the data have."""


class SamplerContract(ComponentContract):
    """What every sampler must do, for the noise process that it is for.

    class TestRestart(SamplerContract):
        config = RestartConfig()

    A sampler for another process than DDPM and flow matching sets `noise_process` and `predict`.
    """

    config: SamplerConfig

    @property
    def noise_process(self) -> NoiseProcess:
        """A process that the sampler is for."""
        return FlowMatching() if issubclass(self.config.process, FlowSpec) else DDPMSchedule()

    def predict(self) -> Predict:
        """The best denoiser of data that are the same number everywhere."""
        process = self.noise_process
        if isinstance(process, DDPMSchedule):
            return lambda noisy, timestep: _noise(process, noisy, timestep)
        return lambda noisy, timestep: (noisy - DATA) / timestep  # ε − x₀, as x_t − x₀ = t·(ε − x₀)

    def test_has_a_plain_name(self) -> None:
        """The name can be written without thinking: lower-case letters, digits, -, _ and +."""
        assert re.fullmatch(r"[a-z0-9_+-]+", self.config.name)

    def test_arrives_at_the_data(self) -> None:
        """With a perfect denoiser, latents of the noise's shape come close to the data, whatever the noise."""
        latents = self.sampled()
        assert latents.shape == SHAPE
        assert latents.dtype == torch.float32
        assert (latents - DATA).abs().max() < 0.2

    def test_depends_on_noise_and_generators_alone(self) -> None:
        """The same seeds give the same latents bit for bit, each image as if alone; global randomness is untouched."""
        before = torch.get_rng_state()
        first, again = self.sampled(), self.sampled()
        assert torch.equal(first, again)
        assert torch.equal(before, torch.get_rng_state())
        torch.testing.assert_close(self.sampled(slice(1, 2)), first[1:])

    def test_asks_for_timesteps_of_the_process(self) -> None:
        """Every timestep that the denoiser is asked for is one of the process, starting with much noise."""
        asked: list[float] = []
        predict = self.predict()

        def noting(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
            asked.append(float(timestep))
            return predict(noisy_latents, timestep)

        self.config.build(self.noise_process)(noting, torch.randn(SHAPE, generator=_generator(0)), 10, _generators())
        assert len(asked) >= 10
        assert 0 <= min(asked) < max(asked) <= self.noise_process.spec.end
        assert max(asked) > 0.8 * self.noise_process.spec.end

    def sampled(self, images: slice = slice(None)) -> Tensor:
        """The latents of some of two images."""
        noise = torch.randn(SHAPE, generator=_generator(0))[images]
        return self.config.build(self.noise_process)(self.predict(), noise, 20, _generators()[images])

    def train_config(self, tables: dict[str, Any], base: Path) -> TrainConfig:
        """The config of a run whose previews use this sampler; a model of another process does not have it."""
        config = config_from_tables(tables, base)
        if not isinstance(config.model.noise_process, self.config.process) or not issubclass(
            self.config.process, DDPMSpec
        ):
            return config
        samples: Any = Catalog.discover().find(ObserverConfig, "samples")
        return attrs.evolve(config, observers=(samples(prompts=("a cat",), sampler=self.config.name),))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _generators() -> list[torch.Generator]:
    return [_generator(1), _generator(2)]


def _noise(process: DDPMSchedule, noisy: Tensor, timestep: Tensor) -> Tensor:
    """ε = (x_t − √ᾱ·x₀) / √(1 − ᾱ); between timesteps, where some samplers ask too, ln σ is interpolated."""
    remaining = torch.cumprod(1 - process.betas, 0)
    log_sigmas = 0.5 * ((1 - remaining) / remaining).log()
    low = int(timestep)
    share = float(timestep) - low
    sigma = torch.lerp(log_sigmas[low], log_sigmas[min(low + 1, len(remaining) - 1)], share).exp()
    signal = (1 + sigma**2) ** -0.5
    return ((noisy.double() - signal * DATA) / (sigma * signal)).float()
