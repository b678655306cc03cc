"""Shrinking by the exact mean of the area that each pixel covers; Pillow's box filter counts pixels whole or not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_STRIP = 256
"""Columns that are averaged at once, which bounds the memory."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge, in pixels."""


def area_mean(pixels: NDArray[np.uint8], size: tuple[int, int], box: Box) -> NDArray[np.uint8]:
    """A part of an image, [H, W] or [H, W, 3], shrunk to a width and height; pixels count by what is covered."""
    left, top, right, bottom = box
    width, height = size
    first, last = int(left), min(int(np.ceil(right)), pixels.shape[1])
    strips = (pixels[:, start : min(start + _STRIP, last)] for start in range(first, last, _STRIP))
    rows = np.concatenate([_means(strip, top, bottom, height) for strip in strips], axis=1)
    found = _means(np.moveaxis(rows, 1, 0), left - first, right - first, width)
    return np.rint(np.moveaxis(found, 0, 1)).clip(0, 255).astype(np.uint8)


def _means(values: NDArray[Any], start: float, stop: float, count: int) -> NDArray[np.float64]:
    """Means of `count` equal parts of the stretch from `start` to `stop` along the first axis, [count, …].

    Each is a difference of the integral ∫₀ˣ of what is constant within a pixel.
    """
    edges = np.linspace(start, stop, count + 1)
    whole = np.minimum(edges.astype(int), len(values) - 1)
    rest = (edges - whole).reshape(-1, *[1] * (values.ndim - 1))
    sums = np.zeros((len(values) + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, dtype=np.float64, out=sums[1:])
    integral = sums[whole] + rest * values[whole]
    means: NDArray[np.float64] = np.diff(integral, axis=0) / ((stop - start) / count)
    return means
