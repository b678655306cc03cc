"""The updates of LoHa and LoKr adapters in files, ΔW = (alpha/rank)·(A₁·B₁) ∘ (A₂·B₂) and (alpha/rank)·W₁ ⊗ W₂.

As LyCORIS, ComfyUI, Forge and A1111 read them: either matrix of LoKr may be a product of two factors, and alpha counts
only where one is. With a core tensor (`…_t1`, `…_t2`), a matrix is a Tucker decomposition of a convolution's weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
"""Suffixes of the tensors of LoHa."""
LOKR = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})
"""Suffixes of the tensors of LoKr."""


def update_of(tensors: Mapping[str, Tensor], alpha: float | Tensor | None) -> Tensor:
    """ΔW from an adapter's tensors by suffix, [O, I] or [O, I, height, width]; without an alpha, alpha is the rank.

    Raises KeyError where a tensor is missing, and RuntimeError or IndexError where shapes do not match.
    """
    if LOHA & tensors.keys():
        first, second = (_matrix(tensors, f"hada_w{n}", tensors.get(f"hada_t{n}")) for n in (1, 2))
        return first * second if alpha is None else first * second * (alpha / len(tensors["hada_w1_b"]))
    first, second = _matrix(tensors, "lokr_w1", None), _matrix(tensors, "lokr_w2", tensors.get("lokr_t2"))
    ranks = [len(tensors[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
    update = torch.kron(first.view(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())
    return update * (alpha / ranks[-1]) if ranks and alpha is not None else update


def _matrix(tensors: Mapping[str, Tensor], name: str, core: Tensor | None) -> Tensor:
    if name in tensors:
        return tensors[name]
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return left @ right if core is None else torch.einsum("ij...,io,jp->op...", core, left, right)
