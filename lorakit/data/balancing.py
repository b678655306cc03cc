"""Balance: as many regularisation images in an epoch as there are images to learn from; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_repeats(own: Sequence[int], wanted: int) -> list[int]:
    """How often each regularisation image appears in an epoch, given its own repeats and how many are wanted.

    Images are taken one after another, each with its own repeats, until there are as many as wanted or
    more; the rest is not used. If all are too few, they are repeated once more in turn until there are
    exactly as many as wanted.
    """
    repeats: list[int] = []
    taken = 0
    for count in own:
        repeats.append(count if taken < wanted else 0)
        taken += repeats[-1]
    if not own or taken >= wanted:
        return repeats
    more, rest = divmod(wanted - taken, len(own))
    return [count + more + (place < rest) for place, count in enumerate(repeats)]
