"""The loss against published values and the formulas written out in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.diffusion.loss import huber_threshold, timestep_weights
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.plugins.catalog import Catalog
from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_model, build_run
from lorakit.training.step.loss import denoising_loss

REFERENCE = {
    0: (0.004254, 0.004250, 0.031623, 1.000000, 0.949710),
    1: (0.008534, 0.008520, 0.041314, 0.997700, 0.930001),
    10: (0.048306, 0.047843, 0.098291, 0.977237, 0.846118),
    100: (0.591443, 0.528883, 0.343931, 0.794328, 0.598297),
    250: (1, 0.673793, 0.695799, 0.562341, 0.412964),
    500: (1, 0.276333, 1.618279, 0.316228, 0.231284),
    750: (1, 0.056170, 4.099164, 0.177828, 0.134613),
    900: (1, 0.014151, 8.346597, 0.125893, 0.110302),
    999: (1, 0.004660, 14.614641, 0.100231, 0.103691),
}
"""By timestep: min-SNR with γ = 5 for ε and v, debiased estimation for ε, thresholds for 0.1: exponential, by SNR."""

EPSILON, VELOCITY = DDPMSchedule(), DDPMSchedule("v_prediction")
STEPS = torch.tensor(list(REFERENCE))


def snr_in_float64(*, zero_terminal: bool = False) -> Tensor:
    """The signal-to-noise ratio at each timestep of the schedule, from its definition."""
    alphas = [1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    signal = torch.tensor(alphas, dtype=torch.float64).cumprod(0).sqrt()
    if zero_terminal:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return signal**2 / (1 - signal**2)


@pytest.mark.parametrize("timestep", REFERENCE)
def test_weights_and_thresholds_have_the_reference_values(timestep: int) -> None:
    """Weights of timesteps and thresholds agree with the reference to all of its digits."""
    steps = torch.tensor([timestep])
    found = (
        timestep_weights(LossConfig(min_snr_gamma=5.0), EPSILON, steps),
        timestep_weights(LossConfig(min_snr_gamma=5.0), VELOCITY, steps),
        timestep_weights(LossConfig(debiased_estimation=True), EPSILON, steps),
        huber_threshold(LossConfig(huber_schedule="exponential"), EPSILON, steps),
        huber_threshold(LossConfig(huber_schedule="snr"), EPSILON, steps),
    )
    assert [value.item() for value in found] == pytest.approx(REFERENCE[timestep], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize(
    ("options", "noise", "formula"),
    [
        ({}, EPSILON, torch.ones_like),
        ({"min_snr_gamma": 2.0}, EPSILON, lambda snr: torch.where(snr < 2, 1, 2 / snr)),
        ({"min_snr_gamma": 2.0}, VELOCITY, lambda snr: snr.clamp(max=2) / (snr + 1)),
        ({"debiased_estimation": True}, VELOCITY, lambda snr: 1 / (snr.clamp(max=1000) + 1)),
        ({"debiased_estimation": True}, EPSILON, lambda snr: snr.clamp(max=1000) ** -0.5),
        (
            {"scale_v_pred_loss_like_noise_pred": True},
            VELOCITY,
            lambda snr: snr.clamp(max=1000) / (snr.clamp(max=1000) + 1),
        ),
        ({"v_pred_like_loss": 0.3}, EPSILON, lambda snr: 1 + 0.3 / (snr.clamp(max=1000) / (snr.clamp(max=1000) + 1))),
        (
            {"min_snr_gamma": 2.0, "debiased_estimation": True, "scale_v_pred_loss_like_noise_pred": True},
            VELOCITY,
            lambda snr: (
                (snr.clamp(max=2) / (snr + 1))
                * (snr.clamp(max=1000) / (snr.clamp(max=1000) + 1))
                / (snr.clamp(max=1000) + 1)
            ),
        ),
    ],
)
def test_weights_are_the_formulas(options: dict[str, Any], noise: DDPMSchedule, formula, zero_terminal: bool) -> None:
    """At every timestep the weights are the written-out ones, of the schedule that noise is mixed by."""
    process = noise.with_zero_terminal_snr() if zero_terminal else noise
    weights = timestep_weights(LossConfig(**options), process, torch.arange(1000))
    expected = formula(snr_in_float64(zero_terminal=zero_terminal))
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=0)
    assert weights.dtype == torch.float32
    assert weights[:-1].isfinite().all()


def test_debiased_estimation_needs_some_signal() -> None:
    """The case that configs refuse: without signal the weight for ε is infinite, and only at the last timestep."""
    weights = timestep_weights(
        LossConfig(debiased_estimation=True), EPSILON.with_zero_terminal_snr(), torch.arange(1000)
    )
    assert weights.isinf().nonzero().tolist() == [[999]]


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("constant", lambda _, sigma: torch.full_like(sigma, 0.2)),
        ("exponential", lambda t, _: torch.exp(math.log(0.2) / 1000 * t)),
        ("snr", lambda _, sigma: (1 - 0.2) / (1 + sigma) ** 2 + 0.2),
    ],
)
def test_thresholds_are_the_formulas(schedule: Any, formula, scale: float, zero_terminal: bool) -> None:
    """At every timestep the threshold is the written-out one times `huber_scale`, whatever the schedule."""
    section = LossConfig(huber_schedule=schedule, huber_c=0.2, huber_scale=scale)
    process = EPSILON.with_zero_terminal_snr() if zero_terminal else EPSILON
    steps = torch.arange(1000)
    sigma = snr_in_float64(zero_terminal=zero_terminal) ** -0.5
    expected = scale * formula(steps.double(), sigma)
    torch.testing.assert_close(huber_threshold(section, process, steps).double(), expected, rtol=2e-6, atol=0)


FORMULAS = {
    "l2": lambda d, _: d**2,
    "l1": lambda d, _: d.abs(),
    "huber": lambda d, c: 2 * c * ((d**2 + c**2).sqrt() - c),
    "smooth_l1": lambda d, c: 2 * ((d**2 + c**2).sqrt() - c),
}
LOSSES: Mapping[str, Any] = {name: Catalog.discover().find(LossConfig, name) for name in FORMULAS}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_distances_and_their_gradients_are_the_formulas(kind: Any, schedule: Any) -> None:
    """Value and gradient are the written-out ones in float64, for small and large differences, image by image."""
    section = LOSSES[kind](huber_schedule=schedule, huber_c=0.05)
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(len(STEPS), 4, 3, 5, generator=generator) * 10 ** torch.linspace(-4, 2, 5)
    difference.requires_grad_()
    exact = difference.detach().double().requires_grad_()
    threshold = huber_threshold(section, EPSILON, STEPS).double().view(-1, 1, 1, 1)
    found = section.build(EPSILON)(difference, torch.zeros_like(difference), STEPS)
    expected = FORMULAS[kind](exact, threshold)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-15)
    torch.testing.assert_close(difference.grad.double(), exact.grad, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("kind", FORMULAS)
def test_no_difference_costs_nothing(kind: Any) -> None:
    """A perfect prediction has loss 0 and a finite gradient, 0 as well."""
    difference = torch.zeros(len(STEPS), 4, 2, 2, requires_grad=True)
    compare = LOSSES[kind]().build(EPSILON.with_zero_terminal_snr())
    cost = compare(difference, torch.zeros_like(difference), STEPS)
    cost.sum().backward()
    assert not cost.any()
    assert torch.equal(difference.grad, torch.zeros_like(difference))


def test_loss_is_the_weighted_mean_of_distances(make_config) -> None:
    """The input holds the perturbed noise, the target the plain one; images are averaged with all weights."""
    section = {"type": "huber", "min_snr_gamma": 5.0, "debiased_estimation": True, "ip_noise_gamma": 0.5}
    config = make_config(loss=section, data={"batch_size": 2}, network={"parts": ["unet"]})
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    batch = evolve(next(run.schedule.batches_from(0, run.loader)), weights=torch.tensor([0.5, 2.0]))
    assert batch.perturbation is not None
    conditioning, t = run.encode(batch), batch.timesteps
    snr = snr_in_float64()[t].view(-1, 1, 1, 1)
    power = snr / (1 + snr)
    noisy = power.sqrt() * batch.latents + (1 - power).sqrt() * (batch.noise + batch.perturbation)
    with torch.no_grad():
        prediction = run.model.predict(noisy.float(), t, conditioning).double()
    c = 0.9 / (1 + snr**-0.5) ** 2 + 0.1
    cost = (2 * c * (((prediction - batch.noise) ** 2 + c**2).sqrt() - c)).mean((1, 2, 3))
    weights = batch.weights * (snr.clamp(max=5) / snr * snr.clamp(max=1000) ** -0.5).flatten()
    found = denoising_loss(run.model, batch, conditioning, run.criterion).double()
    torch.testing.assert_close(found, (cost * weights).mean(), rtol=1e-4, atol=0)


def test_zero_terminal_snr_reaches_the_noise_process(make_config) -> None:
    """With it the run's model mixes, weighs and targets by the changed schedule, without it by its own."""
    last = torch.tensor([999])
    for loss, empty in (({}, False), ({"zero_terminal_snr": True}, True)):
        config = make_config(loss=loss, model={"prediction": "v_prediction"}, network={"parts": ["unet"]})
        model = build_run(prepare(config), Distributed(torch.device("cpu"))).model
        assert (model.noise.signal_to_noise(last).item() == 0) is empty
        assert model.noise.prediction == "v_prediction"


def test_warnings_of_what_a_model_predicts(make_config, tiny_sd1_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A schedule without signal is a warning for models that predict noise, as the config, their files or nobody says.

    The last is known when the run starts, and is a warning then.
    """
    loss, expected = {"zero_terminal_snr": True}, "loss.zero_terminal_snr: suits models that predict the velocity"
    models = ({"prediction": "epsilon"}, {}, {"prediction": "v_prediction"}, {"path": str(tiny_sd1_file)})
    configs = [make_config(model=model, loss=loss) for model in models]
    warned = [any(str(warning).startswith(expected) for warning in config.warnings()) for config in configs]
    assert warned == [True, True, False, False]
    for config in configs:
        build_model(config, torch.device("cpu"))
    (record,) = caplog.records
    assert record.getMessage().startswith(expected)
