"""Many problems told at once."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.errors import DataError

LISTED = 20
"""How many problems a message lists before it only counts them."""


def data_error(problems: Sequence[str]) -> DataError:
    """One error for all problems, each on a line of its own; the first 20 are listed."""
    if len(problems) == 1:
        return DataError(problems[0])
    lines = [f"{len(problems)} problems with the data:", *(f"  {problem}" for problem in problems[:LISTED])]
    if len(problems) > LISTED:
        lines.append(f"  … and {len(problems) - LISTED} more")
    return DataError("\n".join(lines))
