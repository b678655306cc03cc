"""The numbered blocks of a denoiser in named groups, and values given for each block; imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from attrs import frozen


@frozen
class BlockLayout:
    """How the blocks of a denoiser are numbered."""

    count: int
    """How many numbers there are, from 0; some may belong to no block with layers to adapt."""
    groups: Mapping[str, range]
    """The numbers of the blocks of each group, by name: `down`, `mid` and `up` in a U-Net."""

    def group_of(self, number: int) -> str:
        """The group that a block belongs to; empty if it belongs to none."""
        return next((group for group, numbers in self.groups.items() if number in numbers), "")

    def spread(self, values: Mapping[str, Sequence[float]]) -> list[float]:
        """One value for each block, [count], from those for the blocks of some groups; 1 for the other blocks."""
        spread = [1.0] * self.count
        for group, given in values.items():
            for number, value in zip(self.groups[group], given, strict=True):
                spread[number] = value
        return spread


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
