"""The blocks of a U-Net, numbered as sd-scripts numbers them, and numbers that are given for each; imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from attrs import frozen

Side = Literal["down", "mid", "up"]


@frozen
class BlockLayout:
    """How the blocks of a U-Net are numbered: on the way down, in the middle, and on the way up."""

    count: int
    """How many numbers there are, from 0; some may belong to no block with layers to adapt."""
    down: range
    """The numbers of the blocks on the way down."""
    mid: range
    """Those of the blocks in the middle."""
    up: range
    """Those of the blocks on the way up."""

    def numbers(self, side: Side) -> range:
        """The numbers of the blocks of one side."""
        numbers: range = getattr(self, side)
        return numbers

    def spread(self, values: Mapping[Side, Sequence[float]]) -> list[float]:
        """One value for each of all blocks, from those of each side; 1 for blocks that have none."""
        spread = [1.0] * self.count
        for side, own in values.items():
            for number, value in zip(self.numbers(side), own, strict=True):
                spread[number] = value
        return spread


STABLE_DIFFUSION = BlockLayout(25, down=range(12), mid=range(12, 13), up=range(13, 25))
"""Stable Diffusion 1.x and 2.x; layer j of level i is 1 + 3i + j on the way down and 13 + 3i + j on the way up."""

_CURVES: Mapping[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),  # 0 at the end, which cos π/2 is not
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda _: 0.0,
}
_PRESET = re.compile(rf"({'|'.join(_CURVES)})(?:\+(\d+\.?\d*|\.\d+))?")


def curve(text: str, count: int) -> tuple[float, ...]:
    """The values for `count` blocks, two or more, of a curve by its name: `sine`, or `sine+0.25` for 0.25 more.

    Over the way x from 0 at the first block to 1 at the last: `sine` is sin(πx/2), `cosine` cos(πx/2),
    `linear` x, `reverse_linear` 1 − x, and `zeros` 0. Raises ValueError for another text.
    """
    match = _PRESET.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"must be numbers, or one of {', '.join(_CURVES)} with, say, +0.25 behind it, not {text!r}")
    value, base = _CURVES[match[1]], float(match[2] or 0)
    return tuple(value(number / (count - 1)) + base for number in range(count))
