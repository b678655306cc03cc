"""LoHa: a frozen layer plus the Hadamard product of two low-rank matrices, ΔW = (A₁·B₁) ∘ (A₂·B₂).

y = W·x + b + (alpha/rank)·ΔW·x (FedPara, Hyeon-Woo et al., 2022, arXiv:2108.06098). The rank of ΔW is up to rank²,
from as many numbers as LoRA of twice the rank has. No sum of small products replaces ΔW, so it is built, in both
passes: nothing of its size is kept between them.

Shapes: O outputs, I inputs (times the kernel's size), r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.networks.dropout import AdapterDropout, DropoutRates
from lorakit.networks.lora_function import (
    Layer,
    autocast_device,
    base_weights,
    compute_dtype,
    conv_backward,
    conv_options,
    geometry,
)
from lorakit.networks.ranked import RankedModule
from lorakit.utils.rng import keyed_generator

_DEVIATIONS: Mapping[str, float] = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}
"""Standard deviations of the factors at the start, those of LyCORIS."""


class LoHaModule(RankedModule):
    """A LoHa adapter of a linear layer or a convolution.

    The factors are [O, r] and [r, I], those of convolutions flattened, as LyCORIS has them.
    """

    def __init__(self, key: str, base: nn.Module, rank: int, alpha: float, file_alpha: float | None = None) -> None:
        """An adapter with no effect yet; `file_alpha` is the alpha in files, where it differs.

        Raises `AdapterError` for layers of other kinds.
        """
        super().__init__(key, base, rank, alpha, file_alpha)
        weight = self.base.weight
        outputs, inputs = len(weight), weight[0].numel()
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_b", "hada_w2_a"):
            shape = (outputs, rank) if name.endswith("a") else (rank, inputs)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=weight.device)))
        self._draw_kept: Callable[[int], Tensor] | None = None
        self.initialize(0)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """A₂ zero, and the others from normal distributions, as in LyCORIS."""
        for name, factor in self.factors().items():
            if name in _DEVIATIONS:
                draws = keyed_generator(seed, name, self.key).standard_normal(tuple(factor.shape), "float32")
                factor.copy_(torch.from_numpy(draws)).mul_(_DEVIATIONS[name])
            else:
                factor.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus multiplier·scale·ΔW·x, in the dtype of the base's output."""
        scale = self.scale * self.multiplier
        if scale == 0:
            output: Tensor = self.base(x)
            return output
        kept = self._draw_kept(len(x)) if self._draw_kept is not None and self.training else None
        w1_a, w1_b, w2_b, w2_a = self.factors().values()
        return cast("Tensor", _Hadamard.apply(x, w1_a, w1_b, w2_a, w2_b, self.base, scale, kept))  # type: ignore[no-untyped-call]

    def factors(self) -> dict[str, nn.Parameter]:
        """The four factors."""
        return {name: self.get_parameter(name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_b", "hada_w2_a")}

    def rank_of(self, tensors: Mapping[str, Tensor]) -> int | None:
        """The rows of B₁."""
        inner = tensors["hada_w1_b"]
        return len(inner) if inner.ndim else None

    def use_dropout(self, dropout: AdapterDropout, rates: DropoutRates) -> None:
        """Leave out the adapter for some images; nothing else can be dropped of it."""
        self._draw_kept = dropout.kept if rates.module else None


class _Hadamard(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        """The adapted layer's output for input, A₁, B₁, A₂, B₂, base layer, scale, and the images it is applied to."""
        *factors, base, scale, kept = given
        dtype = compute_dtype(x)
        x, (weight, bias) = x.to(dtype), base_weights(base, dtype)
        factors = [factor.to(dtype) for factor in factors]
        update = _update(factors, scale).view(weight.shape)
        if _can_add(dtype) and kept is None:
            out = _applied(base, x, weight + update, bias)
        else:
            change = _applied(base, x, update, None)
            out = _applied(base, x, weight, bias).add_(change if kept is None else _masked(change, kept))
        ctx.save_for_backward(x, kept, *factors)
        ctx.base, ctx.scale = base, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *factors = ctx.saved_tensors
        w1_a, w1_b, w2_a, w2_b = factors
        wants_x = ctx.needs_input_grad[0]
        with torch.autocast(autocast_device(x), enabled=False):
            weight = ctx.base.weight.to(x.dtype)
            update = _update(factors, ctx.scale).view(weight.shape)
            # A gradient is as exact with the sum of both as with either, in any format.
            seen = weight + update if kept is None else update
            grad = grad_out if kept is None else _masked(grad_out, kept)
            grad_x, grad_update = _gradients(ctx.base, grad, x, seen, wants_x)
            if kept is not None and wants_x:
                grad_x = grad_x + _gradients(ctx.base, grad_out, x, weight, True, wants_weight=False)[0]
            grad_update = grad_update.flatten(1).mul(ctx.scale)
            inner = grad_update * (w2_a @ w2_b)
            grad_w1 = inner @ w1_b.t(), w1_a.t() @ inner
            inner = grad_update.mul_(w1_a @ w1_b)
            grad_w2 = inner @ w2_b.t(), w2_a.t() @ inner
        return grad_x, *grad_w1, *grad_w2, None, None, None


def _update(factors: Sequence[Tensor], scale: float) -> Tensor:
    """scale·ΔW, [O, I]."""
    w1_a, w1_b, w2_a, w2_b = factors
    return (w1_a @ w1_b).mul_(w2_a @ w2_b).mul_(scale)


def _can_add(dtype: torch.dtype) -> bool:
    """Whether W + ΔW keeps what is in ΔW: half precision would round small updates away."""
    return dtype.itemsize >= torch.float32.itemsize


def _masked(tensor: Tensor, kept: Tensor) -> Tensor:
    """A tensor, zero where its image is not kept."""
    return tensor * kept.view(-1, *[1] * (tensor.ndim - 1))


def _applied(base: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer puts out with other weights."""
    return F.conv2d(x, weight, bias, *geometry(base)) if weight.ndim == 4 else F.linear(x, weight, bias)


def _gradients(
    base: Layer, grad_out: Tensor, x: Tensor, weight: Tensor, wants_x: bool, *, wants_weight: bool = True
) -> tuple[Any, Any]:
    """Gradients of the input and of the weights with which `_applied` was called, where they are wanted."""
    if weight.ndim == 4:
        wanted = (wants_x, wants_weight, False)
        grad_x, grad_weight, _ = conv_backward(grad_out, x, weight, None, *conv_options(base), wanted)
        return grad_x, grad_weight
    grad_x = grad_out @ weight if wants_x else None
    return grad_x, grad_out.flatten(0, -2).t() @ x.flatten(0, -2) if wants_weight else None
