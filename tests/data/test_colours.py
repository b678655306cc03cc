"""Colours: hue and gamma by the formulas, within their bounds, as often as they should vary."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from lorakit.data.images.augmentation import color_jitter, with_gamma, with_hue_shifted
from lorakit.utils.rng import keyed_generator


@pytest.fixture
def pixels() -> np.ndarray:
    """Random colours, with grey, black, white and pure ones among them."""
    special = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 200)]
    drawn = keyed_generator("colours").integers(0, 256, (57, 3))
    return np.concatenate([special, drawn]).astype(np.uint8).reshape(8, 8, 3)


@pytest.mark.parametrize("degrees", [-16.0, -3.3, 0.0, 7.5, 120.0])
def test_hue_is_that_of_another_library(pixels: np.ndarray, degrees: float) -> None:
    """Each colour is the one that Python's colorsys finds by way of HSV, in float64, to the last rounding."""
    for before, after in zip(pixels.reshape(-1, 3), with_hue_shifted(pixels, degrees).reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        expected = np.array(colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)) * 255
        assert np.abs(after - expected).max() < 0.501


def test_gamma_is_of_values_between_0_and_1(pixels: np.ndarray) -> None:
    """255·(x/255)^γ: black and white stay, and no image gets brighter by the power of numbers up to 255."""
    for gamma in (0.95, 1.0, 1.05):
        expected = 255 * (pixels / 255) ** gamma
        assert np.abs(with_gamma(pixels, gamma) - expected).max() <= 0.5
    assert np.array_equal(with_gamma(pixels, 1.0), pixels)
    assert np.abs(with_gamma(pixels, 0.95).astype(int) - pixels).max() <= 5


def test_a_third_of_images_vary(pixels: np.ndarray) -> None:
    """About a third of draws change an image, half of these its hue; no draw depends on another."""
    drawn = [color_jitter(pixels, keyed_generator("draw", number)) for number in range(1000)]
    changed = [own for own in drawn if not np.array_equal(own, pixels)]
    assert 280 < len(changed) < 380
    # Grey stays grey by hue, and a pure colour pure by gamma.
    hues = [own for own in changed if np.array_equal(own[0, 2], (128, 128, 128))]
    gammas = [own for own in changed if np.array_equal(own[0, 3], (255, 0, 0))]
    assert 120 < len(hues) < 210
    assert len(hues) + len(gammas) == pytest.approx(len(changed), abs=25)
    assert np.array_equal(drawn[7], color_jitter(pixels, keyed_generator("draw", 7)))
