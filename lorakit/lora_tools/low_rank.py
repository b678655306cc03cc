"""Sums, norms and truncation of low-rank updates U·D, whose full matrix is never formed.

O outputs, N inputs times the kernel's size, r rank: U is [O, r], D is [r, N].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from attrs import frozen
from torch import Tensor

from lorakit.errors import AdapterError

_OVERSAMPLED = 16
"""How many more directions than the rank are followed, which makes those of the rank converge faster."""
_MOST_ITERATIONS = 40


@frozen(eq=False)
class Decomposition:
    """Singular vectors and values of an update, the largest first: U·diag(σ)·V."""

    left: Tensor
    """[O, k]."""
    values: Tensor
    """[k]."""
    right: Tensor
    """[k, N]."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Up and down factor of the best approximation of that rank, with √σ in each."""
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]

    def tail(self, rank: int) -> float:
        """The norm of what an approximation of that rank lacks: √Σ σ² over the rest."""
        return float(self.values[rank:].double().norm())


ChooseRank = Callable[[Tensor], int]
"""The rank to keep, by the singular values, the largest first."""


def fixed_rank(rank: int) -> ChooseRank:
    """That rank, or less for a layer that has less. Raises `AdapterError` for ranks below 1."""
    if rank < 1:
        raise AdapterError(f"A rank must be at least 1, not {rank}.")
    return lambda values: min(rank, len(values))


def rank_by_energy(energy: float) -> ChooseRank:
    """The least rank whose σ² sum up to that share of all; raises `AdapterError` unless it is in (0, 1]."""
    if not 0 < energy <= 1:
        raise AdapterError(f"energy is the share of the squared norm to keep, above 0 and at most 1, not {energy:g}.")

    def choose(values: Tensor) -> int:
        squares = values.double().square()
        sums = squares.cumsum(0)
        if not len(sums) or not sums[-1]:
            return min(1, len(sums))
        return min(int((sums < energy * sums[-1]).sum()) + 1, len(sums))

    return choose


def concatenated(terms: Iterable[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """The factors of Σ weight·U·D, of the sum of the ranks: the sum itself, not an approximation."""
    listed = list(terms)
    ups = [up * weight if weight != 1 else up for up, _, weight in listed]
    return torch.cat(ups, dim=1), torch.cat([down for _, down, _ in listed])


def decompose_product(up: Tensor, down: Tensor) -> Decomposition:
    """The singular value decomposition of U·D, through QR of both factors: costs r²·(O + N), not O·N·min(O, N)."""
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    inner, values, outer = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return Decomposition(left @ inner, values, outer @ right.T)


def decompose(update: Tensor) -> Decomposition:
    """The same of a full matrix [O, N], from the eigenvectors of the smaller of M·Mᵀ and Mᵀ·M, in float64."""
    matrix = update.double()
    is_tall = len(matrix) > matrix.shape[1]
    matrix = matrix.T if is_tall else matrix
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    values = squares.sqrt()
    # Those that rounding has left are no directions of the update.
    kept = max(int((squares > squares[:1] * 1e-14).sum()), 1)
    values, vectors = values[:kept], vectors[:, :kept]
    others = (vectors.T @ matrix) / values[:, None].clamp(min=torch.finfo(torch.float64).tiny)
    left, right = (others.T, vectors.T) if is_tall else (vectors, others)
    return Decomposition(left.float(), values.float(), right.float())


def leading(update: Tensor, rank: int) -> Decomposition:
    """The largest singular values of a full matrix [O, N], and their vectors, by subspace iteration in float32.

    It goes on until the squared norm that they hold no longer grows by a ten-millionth. Where that takes long, or the
    rank is not small, they are taken from all.
    """
    size = rank + _OVERSAMPLED
    if 4 * size >= min(update.shape):
        return _first(decompose(update), rank)
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(update @ torch.randn(update.shape[1], size, generator=draw))[0]
    held = 0.0
    for _ in range(_MOST_ITERATIONS):
        right = torch.linalg.qr(update.T @ basis)[0]
        basis, core = torch.linalg.qr(update @ right)
        inner, values, outer = torch.linalg.svd(core)
        before, held = held, float(values[:rank].double().square().sum())
        if held - before <= 1e-7 * held:
            return _first(Decomposition(basis @ inner, values, outer @ right.T), rank)
    return _first(decompose(update), rank)


def _first(found: Decomposition, rank: int) -> Decomposition:
    return Decomposition(found.left[:, :rank], found.values[:rank], found.right[:rank])


def inner_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """⟨U·D, U′·D′⟩, the sum of the products of their numbers."""
    (up, down), (other_up, other_down) = one, other
    left, right = up.T.double() @ other_up.double(), down.double() @ other_down.T.double()
    return float((left * right).sum())


def squared_norm(up: Tensor, down: Tensor) -> float:
    """‖U·D‖², the sum of the squares of its numbers."""
    return max(inner_product((up, down), (up, down)), 0.0)


def relative(error_squares: float, squares: float) -> float:
    """The norm of an error relative to that of what it is the error of; 0 if both are."""
    return math.sqrt(error_squares / squares) if squares else 0.0
