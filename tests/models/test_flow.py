"""Flow matching against its formulas in float64 and values that were computed apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.api.noise import FlowSpec, ShiftLine, shifted
from lorakit.api.sampling import SamplerConfig, TimestepSamplerConfig
from lorakit.diffusion.flow import FlowMatching, shifted_sigmas
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.errors import ModelError
from lorakit.plugins.catalog import Catalog

CATALOG = Catalog.discover()
FLUX, QWEN = ShiftLine(), ShiftLine((256, 8192), (0.5, 0.9))
KREA = ShiftLine((256, 6400), (0.5, 1.15))


def latents(width: int, height: int) -> tuple[int, int, int]:
    """The shape of latents of an image, with sides an eighth as long."""
    return 16, height // 8, width // 8


def test_mixing_and_target() -> None:
    """x_t = (1 − t)·x₀ + t·ε and v = ε − x₀, number by number in float64; the noise and the data follow from both."""
    flow, generator = FlowMatching(), torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 16, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    noisy, velocity = flow.add_noise(x, noise, t), flow.target(x, noise, t)
    for row, share in enumerate(t.tolist()):
        torch.testing.assert_close(noisy[row], (1 - share) * x[row] + share * noise[row], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(noisy - t.view(-1, 1, 1, 1) * velocity, x)
    torch.testing.assert_close(noisy + (1 - t).view(-1, 1, 1, 1) * velocity, noise)


def test_reference_values() -> None:
    """One number of latents, and signal-to-noise ratios, have the values computed apart."""
    flow, t = FlowMatching(), torch.tensor([0.6], dtype=torch.float64)
    x, noise = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (0.12573, -0.53567))
    assert flow.add_noise(x, noise, t).item() == pytest.approx(-0.27111, abs=1e-12)
    assert flow.target(x, noise, t).item() == pytest.approx(-0.66140, abs=1e-12)
    ratios = flow.signal_to_noise(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
    assert ratios.tolist() == pytest.approx([361, 9, 1, 0.111111, 0.002770], abs=5e-7)


def test_timesteps_reach_the_model_in_float32() -> None:
    """The denoiser gets 1000·t in float32, exact where bfloat16 would move in steps of 4."""
    found = FlowMatching().model_timesteps(torch.tensor([0.7, 0.701, 0.999]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([700.0, 701.0, 999.0]), rtol=0, atol=1e-4)
    assert FlowMatching(FlowSpec(timestep_scale=1.0)).model_timesteps(torch.tensor([0.25])).item() == 0.25


@pytest.mark.parametrize(
    ("size", "line", "mu", "shift"),
    [
        ((512, 512), FLUX, 0.63, 1.877611), ((768, 512), FLUX, 0.716667, 2.047597),
        ((768, 768), FLUX, 0.846667, 2.331861), ((1024, 1024), FLUX, 1.15, 3.158193),
        ((1536, 1536), FLUX, 2.016667, 7.513239), ((512, 512), QWEN, 0.53871, 1.713794),
        ((768, 512), QWEN, 0.564516, 1.758597), ((768, 768), QWEN, 0.603226, 1.828006),
        ((1024, 1024), QWEN, 0.693548, 2.000803), ((1536, 1536), QWEN, 0.951613, 2.589884),
        ((512, 512), KREA, 0.58125, 1.788272), ((768, 512), KREA, 0.635417, 1.887809),
        ((768, 768), KREA, 0.716667, 2.047597), ((1024, 1024), KREA, 0.90625, 2.475024),
        ((1536, 1536), KREA, 1.447917, 4.254242),
    ],
)  # fmt: skip
def test_shifts_by_resolution(size: tuple[int, int], line: ShiftLine, mu: float, shift: float) -> None:
    """μ is on the line through the family's two points, beyond them too, and the shift is its exponential."""
    shape = latents(*size)
    assert line.mu_of(shape) == pytest.approx(mu, abs=5e-7)
    assert FlowSpec(shift=line).training_shift(shape) == pytest.approx(shift, abs=5e-7)


@pytest.mark.parametrize(
    ("shift", "terminal", "expected"),
    [
        (1.0, None, (1, 0.75, 0.5, 0.25)),
        (3.0, None, (1, 0.9, 0.75, 0.5)),
        (6.0, None, (1, 0.947368, 0.857143, 0.666667)),
        (math.exp(1.15), None, (1, 0.904531, 0.759511, 0.512844)),
        (2.047597, None, (1, 0.859999, 0.671873, 0.405658)),
        (2.475024, None, (1, 0.881307, 0.712232, 0.452057)),
        (math.exp(2.291180), None, (1, 0.967384, 0.908144, 0.767200)),
        (2.000803, None, (1, 0.857192, 0.666756, 0.400096)),
        (math.exp(0.693548), 0.02, (1, 0.766709, 0.455614, 0.02)),
    ],
)
def test_sigmas(shift: float, terminal: float | None, expected: tuple[float, ...]) -> None:
    """The sigmas of four steps have the values computed apart; a preview's end with 0."""
    assert shifted_sigmas(4, shift, terminal).tolist() == pytest.approx(expected, abs=1e-6)
    sigmas = FlowMatching(FlowSpec(preview_shift=shift, shift_terminal=terminal)).sigmas(4, latents(64, 64))
    assert sigmas.tolist() == pytest.approx([*expected, 0], abs=1e-6)


@pytest.mark.parametrize("size", [(768, 512), (1024, 1024)])
def test_sigmas_are_those_of_diffusers(size: tuple[int, int]) -> None:
    """Sigmas shifted by resolution are those of diffusers' own scheduler."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=FLUX.mu_of(latents(*size)))
    found = FlowMatching(FlowSpec(preview_shift=FLUX)).sigmas(7, latents(*size))
    torch.testing.assert_close(found, scheduler.sigmas.float(), rtol=1e-6, atol=1e-6)


class Drawn:
    """A generator whose normal numbers are known."""

    def __init__(self, number: float) -> None:
        self.number = number

    def standard_normal(self) -> float:
        """The number."""
        return self.number


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.182426, 0.377541, 0.5, 0.679179, 0.880797)),
        ({"shift": 3.0}, (0.400979, 0.645339, 0.75, 0.863964, 0.956835)),
        ({"mean": 1.15}, (0.413383, 0.657011, 0.759511, 0.869892, 0.958909)),
        ({"shift": math.exp(1.15)}, (0.413383, 0.657011, 0.759511, 0.869892, 0.958909)),
        ({"std": 1.5}, (0.095349, 0.320821, 0.5, 0.754915, 0.952574)),
        ({"mean": 0.5, "std": 0.8}, (0.331812, 0.524979, 0.622459, 0.750260, 0.890903)),
    ],
)
def test_logit_normal_draws(settings: dict[str, float], expected: tuple[float, ...]) -> None:
    """For known normal numbers, timesteps have the values computed apart; those of DDPM are their thousandths."""
    config = CATALOG.find(TimestepSamplerConfig, "logit_normal")(**settings)
    numbers = (-1.5, -0.5, 0.0, 0.75, 2.0)
    rngs: list[Any] = [Drawn(number) for number in numbers]
    sample = config.build(FlowMatching())
    assert [sample(rng, latents(64, 64)) for rng in rngs] == pytest.approx(expected, abs=1e-6)
    counted = config.build(DDPMSchedule())
    assert [counted(rng, latents(64, 64)) for rng in rngs] == [int(1000 * value + 1e-3) for value in expected]


class Uniform:
    """A generator whose numbers from 0 to 1 are known."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        """The number."""
        return self.number


def test_mode_and_cosmap_draws() -> None:
    """For known numbers, timesteps have the values computed apart; cosmap's have its density."""
    numbers = (0.05, 0.25, 0.5, 0.75, 0.95)
    rngs: list[Any] = [Uniform(number) for number in numbers]
    mode = CATALOG.find(TimestepSamplerConfig, "mode")().build(FlowMatching())
    found = [mode(rng, latents(64, 64)) for rng in rngs]
    assert found == pytest.approx((0.893441, 0.616416, 0.5, 0.383584, 0.106559), abs=1e-6)
    uniform = CATALOG.find(TimestepSamplerConfig, "mode")(mode_scale=0.0).build(FlowMatching())  # type: ignore[call-arg]
    assert uniform(rngs[1], latents(64, 64)) == 0.75
    cosmap = CATALOG.find(TimestepSamplerConfig, "cosmap")().build(FlowMatching())
    times = [cosmap(Uniform(u), latents(64, 64)) for u in np.linspace(0, 1, 10001)]  # type: ignore[arg-type]
    middles = (np.array(times[1:]) + np.array(times[:-1])) / 2
    density = 1e-4 / np.diff(times)
    np.testing.assert_allclose(density, 2 / (np.pi * (1 - 2 * middles + 2 * middles**2)), rtol=1e-5)
    weights = [2 / (math.pi * (1 - 2 * t + 2 * t * t)) for t in numbers]
    assert weights == pytest.approx((0.703447, 1.018592, 1.273240, 1.018592, 0.703447), abs=1e-6)


def test_a_model_s_own_shift_holds_where_none_is_set() -> None:
    """Timesteps are shifted as the family says for the image's size, unless the config sets a shift."""
    flow, shape, rng = FlowMatching(FlowSpec(shift=FLUX)), latents(768, 512), Drawn(-1.5)
    sampler = CATALOG.find(TimestepSamplerConfig, "logit_normal")
    found = [sampler(shift=shift).build(flow)(rng, shape) for shift in (None, 1.0)]  # type: ignore[arg-type]
    assert found == pytest.approx([0.313602, 0.182426], abs=5e-7)
    rngs: list[Any] = [Drawn(number) for number in (-0.5, 0.0, 0.75, 2.0)]
    others = [sampler().build(flow)(own, shape) for own in rngs]
    assert others == pytest.approx([0.553956, 0.671873, 0.812550, 0.938003], abs=5e-7)


def test_shifting_adds_to_the_logit() -> None:
    """A shift by s adds ln s to the logit of t, and leaves both ends in place."""
    for t in (0.01, 0.4, 0.9):
        found = shifted(t, 2.5)
        assert math.log(found / (1 - found)) == pytest.approx(math.log(t / (1 - t)) + math.log(2.5))
    assert (shifted(0.0, 2.5), shifted(1.0, 2.5)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"min_snr_gamma": 5.0}, ["min_snr_gamma"]),
        ({"debiased_estimation": True, "zero_terminal_snr": True}, ["debiased_estimation", "zero_terminal_snr"]),
        ({"scale_v_pred_loss_like_noise_pred": True}, ["scale_v_pred_loss_like_noise_pred"]),
        ({"v_pred_like_loss": 0.5}, ["v_pred_like_loss"]),
        ({"min_timestep": 10, "max_timestep": 900}, ["min_timestep", "max_timestep"]),
        ({"noise_offset": 0.05, "ip_noise_gamma": 0.1}, []),
    ],
)
def test_options_of_another_process_are_refused(options: dict[str, Any], keys: list[str]) -> None:
    """What is made for DDPM is a problem at its key that says so; what suits both processes is none."""
    problems = list(FlowSpec().loss_problems(CATALOG.find(LossConfig, "l2")(**options)))
    assert [problem.key for problem in problems] == keys
    assert all("flow matching" in problem.message for problem in problems)


def test_other_noise_is_warned_of() -> None:
    """Noise offsets help DDPM, which does not start from pure noise; flow matching does."""
    for options in ({"noise_offset": 0.05}, {"multires_noise_iterations": 6}):
        (warning,) = FlowSpec().loss_warnings(CATALOG.find(LossConfig, "l2")(**options))
        assert warning.key in options
        assert "images start from noise without it" in warning.message
    assert not list(FlowSpec().loss_warnings(CATALOG.find(LossConfig, "l2")(ip_noise_gamma=0.1)))


def test_huber_by_snr_is_refused() -> None:
    """Huber's threshold by signal-to-noise ratio is for DDPM; the others suit flow matching, with t itself."""
    huber = CATALOG.find(LossConfig, "huber")
    assert [problem.key for problem in FlowSpec().loss_problems(huber())] == ["huber_schedule"]
    config = huber(huber_schedule="exponential", huber_c=0.1)
    assert not list(FlowSpec().loss_problems(config))
    d, t = torch.tensor([2.0]).view(1, 1, 1, 1), torch.tensor([0.5])
    c = 0.1**0.5
    found: Tensor = config.build(FlowMatching())(d, torch.zeros_like(d), t)
    assert found.item() == pytest.approx(2 * c * ((4 + c * c) ** 0.5 - c), rel=1e-6)


def test_samplers_refuse_the_other_process() -> None:
    """A sampler for DDPM does not run on flow matching, nor the other way round."""
    noise, none = torch.zeros(1, 4, 2, 2), [torch.Generator()]
    with pytest.raises(ModelError, match="is for DDPM, not for flow matching"):
        CATALOG.find(SamplerConfig, "ddim")().build(FlowMatching())(lambda noisy, _: noisy, noise, 3, none)
    with pytest.raises(ModelError, match="is for flow matching, not for DDPM"):
        CATALOG.find(SamplerConfig, "flow_euler")().build(DDPMSchedule())
