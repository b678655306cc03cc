"""LoKr: a frozen layer plus a Kronecker product of two small matrices, ΔW = W₁ ⊗ W₂.

y = W·x + b + (alpha/rank)·ΔW·x (LyCORIS, Yeh et al., 2024, arXiv:2309.14859). Either matrix may itself be a product
of two factors of the given rank; where neither is, there is no rank, and nothing scales ΔW.

ΔW is never built: with the inputs seen as m groups of n, W₂ is applied to each group, and W₁ across the groups, as
(W₁ ⊗ W₂)·vec(X) = vec(W₁·X·W₂ᵀ) in rows. A convolution applies W₂, which has its kernel, to each group as well.

Shapes: O = p·q outputs and I = m·n inputs; W₁ is [p, m], W₂ [q, n], for convolutions [q, n, height, width]; r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812
from attrs import frozen
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.networks.dropout import AdapterDropout, DropoutRates
from lorakit.networks.lora_function import (
    Layer,
    autocast_device,
    compute_dtype,
    conv_backward,
    conv_options,
    geometry,
)
from lorakit.networks.ranked import RankedModule
from lorakit.utils.rng import keyed_generator


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is the dimension, the smaller one first, as LyCORIS finds them.

    A factor that divides the dimension is one of them; else the smaller one is the largest that is at most the factor
    and the square root. A factor below 0 is none.
    """
    if factor > 0 and dimension % factor == 0:
        smaller = min(factor, dimension // factor)
    else:
        largest = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
        smaller = next(number for number in range(max(largest, 1), 0, -1) if dimension % number == 0)
    return smaller, dimension // smaller


@frozen
class Split:
    """How a layer's weight is a Kronecker product."""

    first: tuple[int, int]
    """Sides p and m of W₁."""
    second: tuple[int, int]
    """Sides q and n of W₂."""
    first_whole: bool = True
    """Whether W₁ is trained itself, not two factors of it."""
    second_whole: bool = True
    """The same for W₂."""

    @classmethod
    def of(cls, layer: Layer, rank: int, factor: int, *, decompose_both: bool, full_matrix: bool) -> Self:
        """As LyCORIS splits: a matrix has factors where that takes fewer numbers, W₁ only with `decompose_both`."""
        (p, q), (m, n) = (factorization(side, factor) for side in layer.weight.shape[:2])
        first_whole = full_matrix or not decompose_both or 2 * rank >= max(p, m)
        return cls((p, m), (q, n), first_whole, full_matrix or 2 * rank >= max(q, n))

    @classmethod
    def in_file(cls, layer: Layer, tensors: Mapping[str, Tensor]) -> Self:
        """That of an adapter in a file by its tensors; one that these do not fit where they do not fit the layer."""
        outputs, inputs = layer.weight.shape[:2]
        p, m = (_side(tensors, "lokr_w1", axis) for axis in (0, 1))
        second = max(outputs // p, 1), max(inputs // m, 1)
        return cls((p, m), second, "lokr_w1" in tensors, "lokr_w2" in tensors)

    @property
    def is_whole(self) -> bool:
        """Whether there are no factors, and so no rank."""
        return self.first_whole and self.second_whole


def _side(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Length of one side of a matrix in a file, which may be there as two factors; 1 where it is no matrix."""
    tensor = tensors.get(name, tensors.get(f"{name}_{'ab'[axis]}"))
    return max(tensor.shape[axis], 1) if tensor is not None and tensor.ndim == 2 else 1


class LoKrModule(RankedModule):
    """A LoKr adapter of a linear layer or a convolution.

    Parameters have the names that LyCORIS gives them: `lokr_w1`, or `lokr_w1_a` [p, r] and `lokr_w1_b` [r, m];
    `lokr_w2`, or `lokr_w2_a` [q, r] and `lokr_w2_b` [r, n·height·width].
    """

    def __init__(
        self, key: str, base: nn.Module, size: tuple[int, float, float | None], split: Callable[[Layer], Split]
    ) -> None:
        """An adapter with no effect yet, of this rank, alpha, and alpha in files where it differs.

        Raises `AdapterError` for layers of other kinds.
        """
        super().__init__(key, base, *size)
        weight = self.base.weight
        self._kernel = tuple(weight.shape[2:])
        self.split = split(self.base)
        if self.split.is_whole:
            self.alpha = self.file_alpha = float(self.rank)
            self.scale = 1.0
        self._shapes = self._factor_shapes()
        for name, shape in self._shapes.items():
            empty = torch.empty(shape, dtype=torch.float32, device=weight.device)
            self.register_parameter(name, nn.Parameter(empty))
        self._draw_kept: Callable[[int], Tensor] | None = None
        self.initialize(0)

    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters; the last one is zero at the start."""
        (p, m), (q, n), rank = self.split.first, self.split.second, self.rank
        first = {"lokr_w1": (p, m)} if self.split.first_whole else {"lokr_w1_a": (p, rank), "lokr_w1_b": (rank, m)}
        if self.split.second_whole:
            return {**first, "lokr_w2": (q, n, *self._kernel)}
        return {**first, "lokr_w2_a": (q, rank), "lokr_w2_b": (rank, n * math.prod(self._kernel))}

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """The last factor zero, and the others uniform in ±1/√columns, which is Kaiming's with a = √5."""
        *others, last = self.factors().items()
        for name, factor in others:
            bound = 1 / math.sqrt(factor.shape[1])
            draws = keyed_generator(seed, name, self.key).random(tuple(factor.shape), "float32")
            factor.copy_(torch.from_numpy(draws)).mul_(2 * bound).sub_(bound)
        last[1].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus multiplier·scale·ΔW·x, in the dtype of the base's output."""
        scale = self.scale * self.multiplier
        out: Tensor = self.base(x)
        if scale == 0:
            return out
        dtype = compute_dtype(x)
        first = self._matrix("lokr_w1", dtype) * scale
        second = self._matrix("lokr_w2", dtype).view(*self.split.second, *self._kernel)
        update = cast("Tensor", _Kronecker.apply(x, first, second, self.base))  # type: ignore[no-untyped-call]
        if self._draw_kept is not None and self.training:
            update = update * self._draw_kept(len(x)).view(-1, *[1] * (x.ndim - 1))
        # A copy, as the output of a quantized layer may be a view; it keeps the layout in memory.
        return out.clone().add_(update)

    def _matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        """W₁ or W₂ in the format to compute in."""
        if name in self._shapes:
            return self.get_parameter(name).to(dtype)
        return self.get_parameter(f"{name}_a").to(dtype) @ self.get_parameter(f"{name}_b").to(dtype)

    def factors(self) -> dict[str, nn.Parameter]:
        """Both matrices, or the factors of those that have some."""
        return {name: self.get_parameter(name) for name in self._shapes}

    def rank_of(self, tensors: Mapping[str, Tensor]) -> int | None:
        """The rows of a second factor."""
        inner = (tensors[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors)
        return next((len(tensor) for tensor in inner if tensor.ndim), None)

    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the factors; without a rank, alpha counts for nothing, whatever the file has."""
        own = {"alpha": torch.tensor(self.alpha)} if self.split.is_whole else {}
        super().load_adapter_state({**tensors, **own})

    def use_dropout(self, dropout: AdapterDropout, rates: DropoutRates) -> None:
        """Leave out the adapter for some images; nothing else is dropped of it."""
        self._draw_kept = dropout.kept if rates.module else None


class _Kronecker(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, base: Layer) -> Tensor:
        """(W₁ ⊗ W₂)·x for linear layers, [..., I] to [..., O], and convolutions."""
        x = x.to(first.dtype)
        ctx.save_for_backward(x, first, second)
        ctx.base = base
        hidden = _second_applied(base, _grouped(x, first, second), second)
        spatial = hidden.shape[2:] if second.ndim == 4 else ()
        out = first @ _across(hidden, first)
        shape = (len(x), -1, *spatial) if second.ndim == 4 else (*x.shape[:-1], -1)
        return out.reshape(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        with torch.autocast(autocast_device(x), enabled=False):
            groups = _grouped(x, first, second)
            hidden = _second_applied(ctx.base, groups, second)
            inner = _across(hidden, first)
            grad = grad_out.reshape(len(inner), len(first), -1)  # [T, p, q], for convolutions [B, p, q·h·w]
            grad_first = torch.einsum("tpq,tmq->pm", grad, inner)
            grad_hidden = (first.t() @ grad).reshape(hidden.shape)
            wants_x = ctx.needs_input_grad[0]
            if second.ndim == 4:
                wanted = (wants_x, True, False)
                options = conv_options(ctx.base)
                grad_x, grad_second, _ = conv_backward(grad_hidden, groups, second, None, *options, wanted)
            else:
                grad_x, grad_second = grad_hidden @ second if wants_x else None, grad_hidden.t() @ groups
        return None if grad_x is None else grad_x.reshape(x.shape), grad_first, grad_second, None


def _grouped(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The inputs as groups of n: [T·m, n], for convolutions [B·m, n, h, w]."""
    if second.ndim == 4:
        return x.reshape(len(x) * first.shape[1], second.shape[1], *x.shape[2:])
    return x.reshape(-1, second.shape[1])


def _second_applied(base: Layer, groups: Tensor, second: Tensor) -> Tensor:
    """W₂ applied to each group: [T·m, q], for convolutions [B·m, q, h, w]."""
    return F.conv2d(groups, second, None, *geometry(base)) if second.ndim == 4 else F.linear(groups, second)


def _across(hidden: Tensor, first: Tensor) -> Tensor:
    """What W₁ is applied to: [T, m, q], for convolutions [B, m, q·h·w]."""
    return hidden.reshape(-1, first.shape[1], hidden.shape[1:].numel())
