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


def _sampler(name: str, title: str, scheduler: str, doc: str, **more: object) -> type[DiffusersSampler]:
    """The sampler that uses a scheduler of diffusers."""
    values = {"name": name, "title": title, "scheduler": scheduler, "__doc__": doc, "__module__": __name__, **more}
    made: type[DiffusersSampler] = frozen(kw_only=True)(type(f"{name}Config", (DiffusersSampler,), values))
    return made


_KARRAS = "(Karras et al., 2022, arXiv:2206.00364)"
DIFFUSERS_SAMPLERS = [
    _sampler("ddim", "DDIM", "scheduling_ddim.DDIMScheduler", "DDIM (Song et al., 2021, arXiv:2010.02502).",
             settings={**_AS_PUBLISHED, "clip_sample": False}),
    _sampler("pndm", "PLMS", "scheduling_pndm.PNDMScheduler",
             "PNDM, also called PLMS (Liu et al., 2022, arXiv:2202.09778).",
             settings={**_AS_PUBLISHED, "skip_prk_steps": True}),
    _sampler("lms", "LMS", "scheduling_lms_discrete.LMSDiscreteScheduler", f"Linear multistep {_KARRAS}.",
             requires=("scipy",)),
    _sampler("euler", "Euler", "scheduling_euler_discrete.EulerDiscreteScheduler", f"Euler's method {_KARRAS}."),
    _sampler("euler_a", "Euler a", "scheduling_euler_ancestral_discrete.EulerAncestralDiscreteScheduler",
             "Euler's method with noise added at each step.", is_stochastic=True),
    _sampler("heun", "Heun", "scheduling_heun_discrete.HeunDiscreteScheduler",
             f"Heun's method: two predictions a step {_KARRAS}."),
    _sampler("dpm_2", "DPM2", "scheduling_k_dpm_2_discrete.KDPM2DiscreteScheduler",
             f"DPM2: two predictions a step {_KARRAS}."),
    _sampler("dpm_2_a", "DPM2 a", "scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteScheduler",
             "DPM2 with noise added at each step.", is_stochastic=True),
    _sampler("dpmsolver", "DPM-Solver", "scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler",
             "DPM-Solver (Lu et al., 2022, arXiv:2206.00927).",
             settings={"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    _sampler("dpmsolver++", "DPM++ 2M", "scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler",
             "DPM-Solver++ 2M (Lu et al., 2022, arXiv:2211.01095).", settings={"algorithm_type": "dpmsolver++"}),
    _sampler("dpmsingle", "DPM++ 2S", "scheduling_dpmsolver_singlestep.DPMSolverSinglestepScheduler",
             "DPM-Solver++ 2S (Lu et al., 2022, arXiv:2211.01095).", settings={"lower_order_final": True}),
]  # fmt: skip


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
    return [*DIFFUSERS_SAMPLERS, FlowEulerConfig]
