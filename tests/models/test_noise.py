"""The noise schedule, against published values, the formulas in float64, and diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from lorakit.builtin.losses import L2Config
from lorakit.diffusion.loss import timestep_weights
from lorakit.diffusion.noise_schedule import DDPMSchedule

REFERENCE = {
    0: (0.99915000, 1175.47),
    1: (0.99829603, 585.864),
    10: (0.99043131, 103.508),
    100: (0.89422348, 8.45389),
    250: (0.67379263, 2.06553),
    500: (0.27633268, 0.38185),
    750: (0.05616985, 0.0595127),
    900: (0.01415114, 0.0143543),
    999: (0.00466010, 0.00468192),
}
"""Share of the signal's power ᾱ and signal-to-noise ratio by timestep."""

ZERO_TERMINAL = {
    0: 0.99915000,
    1: 0.99823345,
    10: 0.98979373,
    100: 0.88676128,
    250: 0.65245702,
    500: 0.24101878,
    750: 0.03279912,
    900: 0.00296039,
    999: 0.0,
}
"""ᾱ by timestep where no signal is left at the last one."""


@pytest.mark.parametrize(("timestep", "expected"), REFERENCE.items())
def test_schedule_has_the_reference_values(timestep: int, expected: tuple[float, float]) -> None:
    """Signal power and signal-to-noise ratio agree with the reference to all of its digits."""
    noise, steps = DDPMSchedule(), torch.tensor([timestep])
    signal = noise.add_noise(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), steps)
    spread = noise.add_noise(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), steps)
    assert signal.item() ** 2 == pytest.approx(expected[0], abs=1e-7)
    assert spread.item() ** 2 == pytest.approx(1 - expected[0], abs=1e-7)
    assert noise.signal_to_noise(steps).item() == pytest.approx(expected[1], rel=5e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_diffusers(prediction: str) -> None:
    """Noisy latents and targets agree with diffusers' DDPM at every timestep."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    noise = DDPMSchedule(prediction)  # type: ignore[arg-type]
    torch.manual_seed(0)
    latents, drawn, steps = torch.randn(1000, 4, 2, 2), torch.randn(1000, 4, 2, 2), torch.arange(1000)
    target = drawn if prediction == "epsilon" else scheduler.get_velocity(latents, drawn, steps)
    torch.testing.assert_close(noise.add_noise(latents, drawn, steps), scheduler.add_noise(latents, drawn, steps))
    torch.testing.assert_close(noise.target(latents, drawn, steps), target)


def test_velocity_and_noisy_latents_determine_the_latents() -> None:
    """Signal times noisy latents less spread times velocity is the latents, the identity that defines the velocity."""
    noise, steps = DDPMSchedule("v_prediction"), torch.tensor([3, 400, 990])
    latents, drawn = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    ratio = noise.signal_to_noise(steps).view(-1, 1, 1, 1)
    signal, spread = (ratio / (1 + ratio)).sqrt(), (1 / (1 + ratio)).sqrt()
    recovered = signal * noise.add_noise(latents, drawn, steps) - spread * noise.target(latents, drawn, steps)
    torch.testing.assert_close(recovered, latents, atol=1e-5, rtol=1e-5)


def test_other_latent_shapes_are_mixed_alike() -> None:
    """Factors belong to the first side, whatever sides follow."""
    noise, steps = DDPMSchedule(), torch.tensor([10, 900])
    latents, drawn = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    flat = noise.add_noise(latents.flatten(1), drawn.flatten(1), steps)
    assert torch.equal(flat.view_as(latents), noise.add_noise(latents, drawn, steps))


@pytest.mark.parametrize("rescaled", [False, True])
def test_betas_are_those_of_diffusers(rescaled: bool) -> None:
    """Each β agrees with diffusers' at every timestep, also where no signal is left at the end."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=rescaled
    )
    noise = DDPMSchedule().with_zero_terminal_snr() if rescaled else DDPMSchedule()
    torch.testing.assert_close(noise.betas.float(), scheduler.betas, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("timestep", "expected"), ZERO_TERMINAL.items())
def test_zero_terminal_schedule_has_the_reference_values(timestep: int, expected: float) -> None:
    """Signal, noise and their ratio are those of the changed schedule, to all digits of the reference."""
    noise, steps = DDPMSchedule().with_zero_terminal_snr(), torch.tensor([timestep])
    signal = noise.add_noise(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), steps)
    spread = noise.add_noise(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), steps)
    assert signal.item() ** 2 == pytest.approx(expected, abs=1e-7)
    assert spread.item() ** 2 == pytest.approx(1 - expected, abs=1e-7)
    assert noise.signal_to_noise(steps).item() == pytest.approx(expected / (1 - expected), rel=5e-5, abs=0)


def test_zero_terminal_schedule_is_that_of_diffusers() -> None:
    """ᾱ agrees with diffusers' rescaled betas at every timestep, and the prediction stays what it was."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    noise = DDPMSchedule("v_prediction").with_zero_terminal_snr()
    steps, one = torch.arange(1000), torch.ones(1000, 1)
    signal = noise.add_noise(one, torch.zeros_like(one), steps).flatten()
    torch.testing.assert_close(signal**2, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert signal[-1] == 0
    assert noise.prediction == "v_prediction"
    assert torch.equal(noise.target(one, torch.zeros_like(one), steps)[-1], torch.tensor([-1.0]))


@pytest.mark.parametrize(
    ("timestep", "min_snr", "debiased"),
    [
        (1, (0.008520, 0.008833), (0.001704, 0.001767)),
        (10, (0.047843, 0.051031), None),
        (100, (0.528883, 0.566194), (0.105777, 0.113239)),
        (250, (0.673793, 0.652457), (0.326207, 0.347543)),
        (500, (0.276333, 0.241019), None),
        (999, (0.004660, 0.0), (0.995340, 1.0)),
    ],
)
def test_weights_of_velocity(timestep: int, min_snr: tuple[float, float], debiased: tuple[float, float] | None) -> None:
    """Weights follow the schedule that is used: the plain one, and the one without signal at its end."""
    plain, steps = DDPMSchedule("v_prediction"), torch.tensor([timestep])
    for noise, by_snr, by_bias in zip(
        (plain, plain.with_zero_terminal_snr()), min_snr, debiased or (None, None), strict=True
    ):
        found = timestep_weights(L2Config(min_snr_gamma=5.0), noise, steps)
        assert found.item() == pytest.approx(by_snr, abs=2e-6)
        if by_bias is not None:
            found = timestep_weights(L2Config(debiased_estimation=True), noise, steps)
            assert found.item() == pytest.approx(by_bias, abs=2e-6)


@pytest.mark.parametrize(
    ("timestep", "plain", "zero"),
    [(100, -1.3446589, -1.3453548), (500, -1.0824351, -1.0492684), (999, -0.5841648, -0.5)],
)
def test_velocity_of_known_numbers(timestep: int, plain: float, zero: float) -> None:
    """V of x = 0.5 and ε = −1.25."""
    noise, steps = DDPMSchedule("v_prediction"), torch.tensor([timestep])
    clean, drawn = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.25)
    assert noise.target(clean, drawn, steps).item() == pytest.approx(plain, abs=1e-6)
    assert noise.with_zero_terminal_snr().target(clean, drawn, steps).item() == pytest.approx(zero, abs=1e-6)
