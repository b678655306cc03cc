"""Samplers: from noise to latents, with a scheduler of diffusers or along the straight lines of flow matching.

B images, C latent channels, h and w latent sides; ᾱₜ the share of the signal's power that is left at timestep t.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from lorakit.diffusion.flow import FlowMatching
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.diffusion.process import NoiseProcess, Predict, Sampler
from lorakit.errors import ModelError

SMALLEST_SIGNAL = 2.0**-24
"""Least ᾱ that a sampler is given: with none left, σ = √(1/ᾱ − 1) would be infinite."""


@frozen
class DiffusersLoop:
    """Samples with a scheduler of diffusers."""

    scheduler: str
    """Its module and class in `diffusers.schedulers`."""
    settings: Mapping[str, object]
    """Its settings where they are not diffusers' defaults."""
    is_stochastic: bool
    """Whether it draws noise in each step."""
    noise_process: NoiseProcess
    """The process to reverse."""

    def __call__(self, predict: Predict, noise: Tensor, steps: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents [B, C, h, w], from standard normal noise of that shape."""
        scheduler = self.build()
        scheduler.set_timesteps(steps)
        options = {"generator": list(generators)} if self.is_stochastic else {}
        latents: Tensor = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            prediction = predict(scheduler.scale_model_input(latents, timestep), timestep)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
        return latents

    def build(self) -> Any:
        """The scheduler, for the betas of the process. Raises ModelError where the process has none."""
        noise = self.noise_process
        if not isinstance(noise, DDPMSchedule):
            raise ModelError(f"{self.scheduler} is for DDPM, not for {noise.spec.title}")
        module, _, name = self.scheduler.rpartition(".")
        cls = getattr(importlib.import_module(f"diffusers.schedulers.{module}"), name)
        remaining = torch.cumprod(1 - noise.betas, dim=0).clamp(min=SMALLEST_SIGNAL)
        betas = 1 - remaining / torch.cat([torch.ones_like(remaining[:1]), remaining[:-1]])
        settings = dict(self.settings)
        if noise.betas[-1] == 1 and "steps_offset" in settings:
            settings |= {"timestep_spacing": "trailing", "steps_offset": 0}
        with warnings.catch_warnings():
            # It announces that DPM-Solver will go in a later version, about which users can do nothing.
            warnings.simplefilter("ignore", FutureWarning)
            return cls(
                num_train_timesteps=noise.spec.num_timesteps,
                trained_betas=betas.tolist(),
                prediction_type=noise.prediction,
                **settings,
            )


def flow_euler(noise_process: NoiseProcess) -> Sampler:
    """Euler's method: x ← x + (t' − t)·v, from t = 1 to 0. Raises ModelError for a process without velocities."""
    if not isinstance(noise_process, FlowMatching):
        raise ModelError(f"flow_euler is for flow matching, not for {noise_process.spec.title}")
    flow = noise_process

    def sample(predict: Predict, noise: Tensor, steps: int, generators: Sequence[torch.Generator]) -> Tensor:  # noqa: ARG001
        latents, sigmas = noise, flow.sigmas(steps, noise.shape[1:])
        for timestep, following in pairwise(sigmas.tolist()):
            velocity = predict(latents, torch.tensor(timestep))
            latents = latents + (following - timestep) * velocity
        return latents

    return sample
