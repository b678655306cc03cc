"""Decompositions of full matrices, compared with float64."""

from __future__ import annotations

import pytest
import torch

from lorakit.lora_tools.low_rank import decompose, leading


def spectrum(kind: str) -> torch.Tensor:
    """300 singular values that fall in some way."""
    index = torch.arange(300, dtype=torch.float64)
    return {
        "low rank": (index < 8).double(), "fast": 0.7**index, "slow": 1 / (1 + index), "flat": 1 - index / 1000,
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["low rank", "fast", "slow", "flat"])
@pytest.mark.parametrize("is_tall", [False, True])
def test_error_is_the_tail(kind: str, is_tall: bool) -> None:
    """At rank 8, what both lack is the tail of the singular values, as near as float32 has it."""
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(300, 300, generator=draw, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(400, 300, generator=draw, dtype=torch.float64))[0]
    values = spectrum(kind)
    matrix = (left * values) @ right.T
    matrix = matrix.T if is_tall else matrix
    whole, tail = float(values.norm()), float(values[8:].norm())
    for found in (decompose(matrix.float()), leading(matrix.float(), 8)):
        up, down = found.factors(8)
        error = float((up.double() @ down.double() - matrix).norm())
        assert error == pytest.approx(tail, rel=2e-5, abs=2e-6 * whole)


def test_zero() -> None:
    """A matrix of zeros has one singular value, zero, and no NaN."""
    for found in (decompose(torch.zeros(200, 300)), leading(torch.zeros(200, 300), 4)):
        up, down = found.factors(4)
        assert not (up @ down).any()
