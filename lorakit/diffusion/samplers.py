"""Samplers by name: the rules that lead from noise to latents, as diffusers has them. Importing this imports no torch.

T timesteps of a noise process; ᾱₜ the share of the signal's power that is left at t.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

if TYPE_CHECKING:
    from lorakit.diffusion.process import NoiseProcess

SamplerName = Literal[
    "ddim", "pndm", "lms", "k_lms", "euler", "k_euler", "euler_a", "k_euler_a", "heun", "dpm_2", "k_dpm_2", "dpm_2_a",
    "k_dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
]  # fmt: skip
"""What samplers are called in prompts and configs; those with `k_` in front are the same as those without."""

SMALLEST_SIGNAL = 2.0**-24
"""Least ᾱ that a sampler is given: with none left, σ = √(1/ᾱ − 1) would be infinite."""


@frozen
class Sampler:
    """A sampler of diffusers."""

    module: str
    """Name of its module in `diffusers.schedulers`, without `scheduling_`."""
    cls: str
    """Name of its class, without `Scheduler`."""
    title: str
    """What web UIs call it, in the text that comes with a picture."""
    settings: Mapping[str, object] = {}
    """Its settings where they are not diffusers' defaults."""
    is_stochastic: bool = False
    """Whether it draws noise in each step."""
    package: str | None = None
    """Optional package that it needs."""


# Published models are sampled so: from one timestep after a multiple of the stride, down to the first one's noise.
_AS_PUBLISHED = {"steps_offset": 1, "set_alpha_to_one": False}
_DDIM = Sampler("ddim", "DDIM", "DDIM", {**_AS_PUBLISHED, "clip_sample": False})
_PNDM = Sampler("pndm", "PNDM", "PLMS", {**_AS_PUBLISHED, "skip_prk_steps": True})
_LMS = Sampler("lms_discrete", "LMSDiscrete", "LMS", package="scipy")
_EULER = Sampler("euler_discrete", "EulerDiscrete", "Euler")
_EULER_A = Sampler("euler_ancestral_discrete", "EulerAncestralDiscrete", "Euler a", is_stochastic=True)
_HEUN = Sampler("heun_discrete", "HeunDiscrete", "Heun")
_DPM_2 = Sampler("k_dpm_2_discrete", "KDPM2Discrete", "DPM2")
_DPM_2_A = Sampler("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscrete", "DPM2 a", is_stochastic=True)
_SOLVER = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_DPM_SOLVER = Sampler("dpmsolver_multistep", "DPMSolverMultistep", "DPM-Solver", _SOLVER)
_DPM_SOLVER_PP = Sampler("dpmsolver_multistep", "DPMSolverMultistep", "DPM++ 2M", {"algorithm_type": "dpmsolver++"})
_DPM_SINGLE = Sampler("dpmsolver_singlestep", "DPMSolverSinglestep", "DPM++ 2S", {"lower_order_final": True})

SAMPLERS: Mapping[SamplerName, Sampler] = {
    "ddim": _DDIM,
    "pndm": _PNDM,
    "lms": _LMS,
    "k_lms": _LMS,
    "euler": _EULER,
    "k_euler": _EULER,
    "euler_a": _EULER_A,
    "k_euler_a": _EULER_A,
    "heun": _HEUN,
    "dpm_2": _DPM_2,
    "k_dpm_2": _DPM_2,
    "dpm_2_a": _DPM_2_A,
    "k_dpm_2_a": _DPM_2_A,
    "dpmsolver": _DPM_SOLVER,
    "dpmsolver++": _DPM_SOLVER_PP,
    "dpmsingle": _DPM_SINGLE,
}
"""All samplers by name."""


def missing_package(name: SamplerName) -> str | None:
    """The package that a sampler needs and that is not installed; None where nothing is missing."""
    package = SAMPLERS[name].package
    return package if package and importlib.util.find_spec(package) is None else None


def build_scheduler(name: SamplerName, noise: NoiseProcess) -> Any:
    """The scheduler of diffusers for a sampler and for latents noised by this process.

    A process that ends without signal is sampled from its last timestep on (Lin et al., 2024, arXiv:2305.08891).
    """
    import torch

    sampler = SAMPLERS[name]
    cls = getattr(
        importlib.import_module(f"diffusers.schedulers.scheduling_{sampler.module}"), f"{sampler.cls}Scheduler"
    )
    remaining = torch.cumprod(1 - noise.betas, dim=0).clamp(min=SMALLEST_SIGNAL)
    betas = 1 - remaining / torch.cat([torch.ones_like(remaining[:1]), remaining[:-1]])
    settings = dict(sampler.settings)
    if noise.betas[-1] == 1 and "steps_offset" in settings:
        settings |= {"timestep_spacing": "trailing", "steps_offset": 0}
    with warnings.catch_warnings():
        # It announces that DPM-Solver will go in a later version, for which this one's user can do nothing.
        warnings.simplefilter("ignore", FutureWarning)
        return cls(
            num_train_timesteps=noise.num_timesteps,
            trained_betas=betas.tolist(),
            prediction_type=noise.prediction,
            **settings,
        )
