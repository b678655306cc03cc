"""Where a tensor is in a file: under its own name, or in some rows of a larger one."""

from __future__ import annotations

from attrs import frozen


@frozen
class TensorSlice:
    """Some rows of a stored tensor: a part of its first side."""

    name: str
    """Name of the stored tensor."""
    start: int
    """The first row."""
    stop: int
    """The row after the last."""


TensorRef = str | TensorSlice
"""All of the stored tensor of that name, or some of its rows."""
