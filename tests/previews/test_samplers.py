"""Samplers lead from noise to the data, for distributions whose denoiser can be written down.

The data are latents x ~ N(μ, s²). With √ᾱ the signal's and √(1−ᾱ) the noise's share of noisy latents y, the
best prediction of the noise is ε(y) = √(1−ᾱ)·(y − √ᾱ·μ) / (ᾱ·s² + 1 − ᾱ), and that of the data
x(y) = (y − √(1−ᾱ)·ε(y)) / √ᾱ.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.noise import DDPMSpec
from lorakit.api.sampling import SamplerConfig
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.plugins.catalog import Catalog
from lorakit.previews.prompts import MOST_STEPS, Prompt, find_sampler, preview_jobs
from lorakit.previews.sampling import sample_latents

CATALOG = Catalog.discover()
NAMES = (
    "ddim", "pndm", "lms", "k_lms", "euler", "k_euler", "euler_a", "k_euler_a", "heun", "dpm_2", "k_dpm_2", "dpm_2_a",
    "k_dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
)  # fmt: skip
SAMPLERS: Mapping[str, Any] = {name: find_sampler(name, CATALOG) for name in NAMES}
STOCHASTIC = {name for name, sampler in SAMPLERS.items() if sampler.is_stochastic}
FAMILY = CATALOG.find(ModelFamilyConfig, "sd1")(path="model")
TEXTS: Mapping[str, Mapping[str, Tensor]] = {text: {"states": torch.zeros(1, 1)} for text in ("", "x")}


class Gaussian:
    """The best denoiser of latents that are normally distributed."""

    def __init__(self, noise: DDPMSchedule, mean: float, deviation: float) -> None:
        self.noise = noise
        self.mean = mean
        self.deviation = deviation
        self.denoiser = nn.Linear(1, 1)
        remaining = torch.cumprod(1 - noise.betas, 0)
        # Between timesteps, where some samplers ask too, σ is what grows evenly, in its logarithm.
        self._log_sigmas = (0.5 * ((1 - remaining) / remaining.clamp(min=2**-24)).log()).numpy()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """As of Stable Diffusion."""
        return 4, height // 8, width // 8

    def predict(self, noisy: Tensor, timesteps: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        """The noise or the velocity."""
        times = timesteps.double().numpy()
        sigma = torch.from_numpy(np.exp(np.interp(times, np.arange(1000), self._log_sigmas))).view(-1, 1, 1, 1)
        signal, spread = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        y = noisy.double()
        variance = (signal * self.deviation) ** 2 + spread**2
        epsilon = spread * (y - signal * self.mean) / variance
        data = self.mean + signal * self.deviation**2 * (y - signal * self.mean) / variance
        return (epsilon if self.noise.prediction == "epsilon" else signal * epsilon - spread * data).float()


def drawn(model: Gaussian, sampler: str, steps: int = 40, seed: int = 5) -> Tensor:
    """Latents [4, 32, 32] of one picture without guidance."""
    prompt = Prompt(prompt="x", width=256, height=256, steps=steps, scale=1.0, sampler=sampler, seed=seed)
    return sample_latents(model, preview_jobs([prompt], 0, FAMILY), TEXTS, 1)[0]


NOISES = {
    "epsilon": DDPMSchedule(),
    "velocity": DDPMSchedule("v_prediction"),
    "zero terminal": DDPMSchedule("v_prediction").with_zero_terminal_snr(),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_arrive_at_the_data(sampler: str, noise: str) -> None:
    """With a single possible result, each sampler ends there but for the last timestep's noise."""
    latents = drawn(Gaussian(NOISES[noise], mean=0.5, deviation=0.0), sampler)
    assert (latents - 0.5).abs().max() < 0.2
    assert abs(latents.mean() - 0.5) < 0.01


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_keep_the_spread(sampler: str, noise: str) -> None:
    """Of data as spread as the noise, samplers draw such; those without chance give back the noise they began with."""
    latents = drawn(Gaussian(NOISES[noise], mean=0.0, deviation=1.0), sampler, steps=80)
    assert latents.std() == pytest.approx(1, abs=0.05)
    start = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(5))
    correlation = (latents * start).mean() / latents.std() / start.std()
    assert correlation < 0.5 if sampler in STOCHASTIC else correlation > 0.99


@pytest.mark.parametrize("sampler", sorted(STOCHASTIC))
def test_chance_follows_the_seed(sampler: str) -> None:
    """What stochastic samplers draw depends on the picture's seed, and on nothing that was drawn before."""
    model = Gaussian(NOISES["epsilon"], mean=0.0, deviation=1.0)
    before = torch.get_rng_state()
    first, again, other = drawn(model, sampler), drawn(model, sampler), drawn(model, sampler, seed=6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_names_are_those_that_are_known() -> None:
    """Each sampler for DDPM is among the names that sd-scripts has, and `k_` in front changes nothing."""
    registered = [own.component for same in CATALOG.of_kind(SamplerConfig).values() for own in same]
    assert {own for own in registered if own.process is DDPMSpec} == set(SAMPLERS.values())
    for name in SAMPLERS:
        if name.startswith("k_"):
            assert SAMPLERS[name] is SAMPLERS[name[2:]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_exist(sampler: str) -> None:
    """For any number of steps, samplers ask for timesteps of the process; without signal, they begin at the last."""
    for noise in NOISES.values():
        for steps in (3, 30, MOST_STEPS):
            scheduler = SAMPLERS[sampler]().build(noise).build()
            scheduler.set_timesteps(steps)
            assert 0 <= scheduler.timesteps.min() <= scheduler.timesteps.max() <= 999
            assert noise is not NOISES["zero terminal"] or scheduler.timesteps[0] == 999


def test_only_the_scheduler_is_imported() -> None:
    """A sampler brings in neither diffusers' models and pipelines nor transformers."""
    code = (
        "import sys; from lorakit.diffusion.noise_schedule import DDPMSchedule;"
        "from lorakit.builtin.samplers import *;"
        "DIFFUSERS_SAMPLERS[0]().build(DDPMSchedule()).build();"
        "print([m for m in ('diffusers.pipelines', 'diffusers.models', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
