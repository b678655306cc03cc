"""Perceptual hashes: numbers that are nearly the same for images that look nearly the same."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lorakit.data.images.decode import load_small

BITS = 64
"""Bits of a hash."""
NEAR = 6
"""Bits in which the hashes of nearly equal images differ at most. Copies that were resized, compressed or brightened
stay below, and so do photographs of one moment; photographs of different things differ in 20 or more."""
_DECODED = 128
"""Pixels that the sides of a decoded JPEG have at least; the hash is computed from 32."""
_BLOCK = 512
"""Hashes that are compared with all others at once."""


def has_perceptual_hash() -> bool:
    """Whether the package that computes the hashes is installed."""
    return find_spec("imagehash") is not None


def perceptual_hash(path: Path) -> str:
    """The pHash of an image, in hexadecimal: signs of the lowest frequencies of its brightness against their median.

    Raises DataError where the image is damaged.
    """
    import imagehash

    return str(imagehash.phash(load_small(path, _DECODED)))


def near_pairs(hashes: Sequence[str], most: int = NEAR) -> list[tuple[int, int, int]]:
    """Pairs of hashes in which at most `most` bits differ: their places, the smaller first, and how many do."""
    numbers = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    found = []
    for start in range(0, len(numbers), _BLOCK):
        differing = np.bitwise_count(numbers[start : start + _BLOCK, None] ^ numbers[None, start:])
        for row, column in zip(*np.nonzero(differing <= most), strict=True):
            if row < column:
                found.append((start + int(row), start + int(column), int(differing[row, column])))
    return found
