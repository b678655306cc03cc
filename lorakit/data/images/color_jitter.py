"""Colours that vary: hue and gamma, changed so little that an image stays what it is; imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

P_APPLY = 0.33
"""How often an image is changed; half of the time its hue, half of the time its gamma."""
LARGEST_HUE_SHIFT = 16.0
"""Degrees by which hues are turned at most, either way."""
GAMMAS = (0.95, 1.05)
"""The least and the greatest gamma."""


def color_jitter(pixels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """RGB pixels [H, W, 3] as they are, or with another hue, or with another gamma."""
    if generator.random() >= P_APPLY:
        return pixels
    if generator.random() < 0.5:
        return with_hue_shifted(pixels, generator.uniform(-LARGEST_HUE_SHIFT, LARGEST_HUE_SHIFT))
    return with_gamma(pixels, generator.uniform(*GAMMAS))


def with_gamma(pixels: NDArray[np.uint8], gamma: float) -> NDArray[np.uint8]:
    """255·(x/255)^γ of each number: black and white stay, and what is between gets darker where γ is above 1."""
    levels = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return np.take(levels, pixels)


def with_hue_shifted(pixels: NDArray[np.uint8], degrees: float) -> NDArray[np.uint8]:
    """RGB pixels with hues turned on the colour circle; saturation and value, as HSV has them, stay.

    With V the largest channel and C its distance to the smallest, a channel of hue H is
    V − C·max(0, min(k, 4 − k, 1)), where k = (n + H/60°) mod 6 and n = 5, 3, 1 for red, green and blue.
    """
    numbers = pixels.astype(np.float32)
    red, green, blue = np.moveaxis(numbers, -1, 0)
    value = numbers.max(axis=-1)
    chroma = value - numbers.min(axis=-1)
    divisor = np.maximum(chroma, 1)
    hue = np.select(
        [value == red, value == green],
        [(green - blue) / divisor, 2 + (blue - red) / divisor],
        4 + (red - green) / divisor,
    )
    k = (np.array([5, 3, 1], np.float32) + (hue + degrees / 60)[..., None]) % 6
    shifted = value[..., None] - chroma[..., None] * np.minimum(k, 4 - k).clip(0, 1)
    whole: NDArray[np.uint8] = np.rint(shifted).astype(np.uint8)
    return whole
