"""Counts numbered layers by the names of their tensors."""

from __future__ import annotations

from lorakit.checkpoints import Shapes


def count(shapes: Shapes, template: str) -> int:
    """How many there are of `template` with 0, 1, 2, … in it, by the largest that some tensor's name starts with.

    Raises ValueError where that is more than there are tensors.
    """
    before, _, behind = template.partition("{}")
    numbered = (name.removeprefix(before) for name in shapes if name.startswith(before))
    found = {number for number, end, _ in (rest.partition(behind) for rest in numbered) if end}
    length = max((int(number) + 1 for number in found if number.isdecimal() and len(number) < 9), default=0)
    if length > len(shapes):
        raise ValueError(f"{template.format(length - 1)} is counted further than there are tensors")
    return length
