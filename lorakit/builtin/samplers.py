"""The samplers of previews: those of diffusers for DDPM, and Euler's method for flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from lorakit.api.hookspecs import hookimpl
from lorakit.api.noise import FlowSpec, NoiseSpec
from lorakit.api.sampling import SamplerConfig

if TYPE_CHECKING:
    from lorakit.diffusion.process import NoiseProcess, Sampler

# Published models are sampled so: from one timestep after a multiple of the stride, down to the first one's noise.
_AS_PUBLISHED = {"steps_offset": 1, "set_alpha_to_one": False}


@frozen(kw_only=True)
class DiffusersSampler(SamplerConfig):
    """A scheduler of diffusers."""

    scheduler: ClassVar[str]
    """Its module and class in `diffusers.schedulers`: `scheduling_ddim.DDIMScheduler`."""
    settings: ClassVar[Mapping[str, object]] = {}
    """Its settings where they are not diffusers' defaults."""
    is_stochastic: ClassVar[bool] = False
    """Whether it draws noise in each step."""

    def build(self, noise_process: NoiseProcess) -> Sampler:
        """The function that samples with the scheduler."""
        from lorakit.diffusion.samplers import DiffusersLoop

        return DiffusersLoop(self.scheduler, self.settings, self.is_stochastic, noise_process)


@frozen(kw_only=True)
class DDIMConfig(DiffusersSampler):
    """DDIM (Song et al., 2021, arXiv:2010.02502)."""

    name, title = "ddim", "DDIM"
    scheduler = "scheduling_ddim.DDIMScheduler"
    settings: ClassVar[Mapping[str, object]] = {**_AS_PUBLISHED, "clip_sample": False}


@frozen(kw_only=True)
class PNDMConfig(DiffusersSampler):
    """PNDM, also called PLMS (Liu et al., 2022, arXiv:2202.09778)."""

    name, title = "pndm", "PLMS"
    scheduler = "scheduling_pndm.PNDMScheduler"
    settings: ClassVar[Mapping[str, object]] = {**_AS_PUBLISHED, "skip_prk_steps": True}


@frozen(kw_only=True)
class LMSConfig(DiffusersSampler):
    """Linear multistep (Karras et al., 2022, arXiv:2206.00364)."""

    name, title = "lms", "LMS"
    requires = ("scipy",)
    scheduler = "scheduling_lms_discrete.LMSDiscreteScheduler"


@frozen(kw_only=True)
class EulerConfig(DiffusersSampler):
    """Euler's method (Karras et al., 2022, arXiv:2206.00364)."""

    name, title = "euler", "Euler"
    scheduler = "scheduling_euler_discrete.EulerDiscreteScheduler"


@frozen(kw_only=True)
class EulerAncestralConfig(DiffusersSampler):
    """Euler's method with noise added at each step."""

    name, title, is_stochastic = "euler_a", "Euler a", True
    scheduler = "scheduling_euler_ancestral_discrete.EulerAncestralDiscreteScheduler"


@frozen(kw_only=True)
class HeunConfig(DiffusersSampler):
    """Heun's method: two predictions a step (Karras et al., 2022, arXiv:2206.00364)."""

    name, title = "heun", "Heun"
    scheduler = "scheduling_heun_discrete.HeunDiscreteScheduler"


@frozen(kw_only=True)
class DPM2Config(DiffusersSampler):
    """DPM2: two predictions a step (Karras et al., 2022, arXiv:2206.00364)."""

    name, title = "dpm_2", "DPM2"
    scheduler = "scheduling_k_dpm_2_discrete.KDPM2DiscreteScheduler"


@frozen(kw_only=True)
class DPM2AncestralConfig(DiffusersSampler):
    """DPM2 with noise added at each step."""

    name, title, is_stochastic = "dpm_2_a", "DPM2 a", True
    scheduler = "scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteScheduler"


@frozen(kw_only=True)
class DPMSolverConfig(DiffusersSampler):
    """DPM-Solver (Lu et al., 2022, arXiv:2206.00927)."""

    name, title = "dpmsolver", "DPM-Solver"
    scheduler = "scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler"
    settings: ClassVar[Mapping[str, object]] = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}


@frozen(kw_only=True)
class DPMSolverPPConfig(DiffusersSampler):
    """DPM-Solver++ 2M (Lu et al., 2022, arXiv:2211.01095)."""

    name, title = "dpmsolver++", "DPM++ 2M"
    scheduler = "scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler"
    settings: ClassVar[Mapping[str, object]] = {"algorithm_type": "dpmsolver++"}


@frozen(kw_only=True)
class DPMSingleConfig(DiffusersSampler):
    """DPM-Solver++ 2S (Lu et al., 2022, arXiv:2211.01095)."""

    name, title = "dpmsingle", "DPM++ 2S"
    scheduler = "scheduling_dpmsolver_singlestep.DPMSolverSinglestepScheduler"
    settings: ClassVar[Mapping[str, object]] = {"lower_order_final": True}


@frozen(kw_only=True)
class FlowEulerConfig(SamplerConfig):
    """Euler's method for flow matching."""

    name, title = "flow_euler", "Euler"
    process: ClassVar[type[NoiseSpec]] = FlowSpec

    def build(self, noise_process: NoiseProcess) -> Sampler:
        """The function that samples."""
        from lorakit.diffusion.samplers import flow_euler

        return flow_euler(noise_process)


@hookimpl
def register_samplers() -> list[type[SamplerConfig]]:
    """All of them."""
    return [
        DDIMConfig, PNDMConfig, LMSConfig, EulerConfig, EulerAncestralConfig, HeunConfig, DPM2Config,
        DPM2AncestralConfig, DPMSolverConfig, DPMSolverPPConfig, DPMSingleConfig, FlowEulerConfig,
    ]  # fmt: skip
