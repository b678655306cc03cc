"""Where a tensor is in a file: under a name of its own, or in some rows of a larger one."""

from __future__ import annotations

from attrs import frozen


@frozen
class TensorSlice:
    """One of several equal portions of a stored tensor, cut along its first side."""

    name: str
    """Name of the stored tensor."""
    index: int
    """Which portion it is, counted from 0."""
    count: int
    """How many portions there are."""


TensorRef = str | TensorSlice
"""All of the stored tensor of that name, or some of its rows."""
