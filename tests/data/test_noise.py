"""Kinds of noise: their formulas and their statistics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.diffusion.noise import RngFactory, channel_offset, normal, perturbation, pyramid_noise, target_noise
from lorakit.utils.rng import keyed_generator

LATENTS = torch.linspace(-1, 2, 4 * 8 * 6).view(4, 8, 6)


def generators(image: int = 0) -> RngFactory:
    """The generators of one of many images."""
    return lambda purpose: keyed_generator(3, purpose, image)


def many(draw: Callable[[np.random.Generator], Tensor], count: int = 3000) -> Tensor:
    """Independent draws, stacked."""
    return torch.stack([draw(keyed_generator(5, "many", image)) for image in range(count)])


def test_plain_noise_is_standard_normal() -> None:
    """Without options the noise is the plain draw, bit for bit, of unit deviation."""
    assert torch.equal(target_noise(LATENTS, LossConfig(), generators()), normal(generators()("noise"), LATENTS.shape))
    drawn = many(lambda generator: normal(generator, (4, 4)))
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02
    assert abs(float(drawn.pow(4).mean()) - 3) < 0.15


def test_offset_shifts_whole_channels() -> None:
    """What the option adds is one number for each channel, normal with the strength as deviation."""
    plain = target_noise(LATENTS, LossConfig(), generators())
    added = target_noise(LATENTS, LossConfig(noise_offset=0.2), generators()) - plain
    torch.testing.assert_close(added, added[:, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    drawn = many(lambda generator: channel_offset(LATENTS, LossConfig(noise_offset=0.2), generator))
    assert drawn.shape == (3000, 4, 1, 1)
    assert abs(float(drawn.mean())) < 0.01
    assert float(drawn.std()) == pytest.approx(0.2, rel=0.03)
    assert float(torch.corrcoef(drawn.view(3000, 4).T).triu(1).abs().max()) < 0.08


def test_random_strength_of_the_offset() -> None:
    """A strength that is even between 0 and s gives variance s²/3, and one strength to all channels of an image."""
    section = LossConfig(noise_offset=0.3, noise_offset_random_strength=True)
    drawn = many(lambda generator: channel_offset(LATENTS, section, generator))
    assert float(drawn.var()) == pytest.approx(0.3**2 / 3, rel=0.06)
    generator = keyed_generator(1)
    found = channel_offset(LATENTS, section, keyed_generator(1)).flatten()
    strength = 0.3 * generator.random()
    torch.testing.assert_close(found, strength * normal(generator, (4, 1, 1)).flatten())


@pytest.mark.parametrize("scale", [0.5, -0.2])
def test_adaptive_strength(scale: float) -> None:
    """The strength grows with the absolute mean of each channel of the latents, and never falls below 0."""
    section = LossConfig(noise_offset=0.1, adaptive_noise_scale=scale)
    generator = keyed_generator(2)
    drawn = normal(generator, (4, 1, 1)).double().flatten()
    means = LATENTS.double().mean((1, 2)).abs()
    expected = torch.maximum(0.1 + scale * means, torch.zeros(4)) * drawn
    found = channel_offset(LATENTS, section, keyed_generator(2)).double().flatten()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert (expected == 0).any() == (scale < 0)


def test_coarser_noise_is_the_sum_of_the_formula() -> None:
    """Written-out sum of brought-up draws, divided by its deviation; levels end with the first side of 1."""
    noise = normal(keyed_generator(8), (4, 16, 12))
    generator, total, levels = keyed_generator(9), noise.double(), 0
    for level in range(10):
        ratio = float(generator.uniform(2, 4)) ** level
        height, width = max(1, int(16 / ratio)), max(1, int(12 / ratio))
        coarse = normal(generator, (1, 4, height, width)).double()
        total = total + 0.6**level * torch.nn.Upsample((16, 12), mode="bilinear")(coarse)[0]
        levels += 1
        if min(height, width) == 1:
            break
    assert 2 < levels < 6
    found = pyramid_noise(noise, 10, 0.6, keyed_generator(9))
    torch.testing.assert_close(found.double(), total / total.std(), rtol=1e-4, atol=1e-5)


def test_coarser_noise_has_unit_deviation_and_low_frequencies() -> None:
    """Each image's noise has deviation 1 and mean 0 over many; neighbours agree more than in plain noise."""
    section = LossConfig(multires_noise_iterations=6, multires_noise_discount=0.8)
    latents = torch.zeros(4, 16, 16)
    drawn = torch.stack([target_noise(latents, section, generators(image)) for image in range(300)])
    torch.testing.assert_close(drawn.flatten(1).std(dim=1), torch.ones(300), rtol=1e-4, atol=0)
    assert abs(float(drawn.mean())) < 0.05
    assert float((drawn[..., 1:] * drawn[..., :-1]).mean()) > 0.2
    plain = torch.stack([target_noise(latents, LossConfig(), generators(image)) for image in range(300)])
    assert abs(float((plain[..., 1:] * plain[..., :-1]).mean())) < 0.02


def test_more_levels_are_no_other_ones() -> None:
    """A limit that is never reached changes nothing, and one that is does."""
    noise = normal(keyed_generator(8), (4, 8, 8))
    results = [pyramid_noise(noise, levels, 0.9, keyed_generator(4)) for levels in (1, 20, 50)]
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


def test_inputs_are_left_alone() -> None:
    """Neither noise nor latents are written to."""
    noise, latents = normal(keyed_generator(8), (4, 8, 8)), LATENTS.clone()
    before = noise.clone()
    pyramid_noise(noise, 3, 0.5, keyed_generator(1))
    target_noise(latents, LossConfig(noise_offset=0.1, adaptive_noise_scale=0.1), generators())
    assert torch.equal(noise, before)
    assert torch.equal(latents, LATENTS)


@pytest.mark.parametrize(("random", "variance"), [(False, 0.2**2), (True, 0.2**2 / 3)])
def test_perturbation_has_its_strength(random: bool, variance: float) -> None:
    """Deviation γ; with random strength variance γ²/3, and one strength to all of an image."""
    section = LossConfig(ip_noise_gamma=0.2, ip_noise_gamma_random_strength=random)
    drawn = many(lambda generator: perturbation((4, 4, 4), section, generator))
    assert float(drawn.var()) == pytest.approx(variance, rel=0.05)
    deviations = drawn.flatten(1).std(dim=1)
    assert (float(deviations.max() / deviations.min()) > 5) is random
