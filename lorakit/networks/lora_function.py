"""A frozen layer plus a low-rank update, y = W·x + b + scale·U·(D·x), as one operation.

Written by hand because it is the innermost loop: the update is added to the base layer's output in
place, the activations are never copied to the factors' float32, and only the input and the rank-r
activations are kept for the backward pass. The base layer's weight is asked for in both passes, as a
layer may keep it in another form. Where the factors are views of flat buffers, the backward pass adds
their gradients there by itself.

Shapes: B images or texts, L positions in each, r rank. "Rows" are [B, L, channels], a view in either
memory format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.networks.flat_parameters import FlatView, add_product

DropoutMask = Callable[[Tensor], Tensor]
"""Given the rank-r activations as rows [B, L, r], what to multiply them by, in their dtype, broadcastable to them."""

Layer = nn.Linear | nn.Conv2d
"""What can be adapted."""

FlatFactors = tuple[FlatView, FlatView]
"""Down and up factor in flat buffers."""

LowRankOperation = Callable[[Tensor, Tensor, Tensor, nn.Module, float, DropoutMask | None, FlatFactors | None], Tensor]
"""Output of input, down and up factor, base layer, scale, dropout, and the factors in flat buffers.

Differentiable in the first three; gradients of factors in flat buffers are added there.
"""


class _LowRank(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Layer, *options: Any) -> Tensor:
        scale, draw_mask, flat = options
        dtype = compute_dtype(x)
        if flat is not None and can_use(flat[0], dtype):
            down, up = ctx.factors = [own.weight for own in flat]
            ctx.sums = [own.gradient for own in flat]
        else:
            down, up = down.to(dtype), up.to(dtype)
            ctx.factors, ctx.sums = None, (None, None)
        x, (weight, bias) = x.to(dtype), base_weights(base, dtype)
        is_conv = isinstance(base, nn.Conv2d)
        out = F.conv2d(x, weight, bias, *geometry(base)) if is_conv else F.linear(x, weight, bias)
        # scale·D·x as rows [B, L, r]
        if is_pointwise(base):
            rows = _rows(base, x)
            hidden = x.new_empty(*rows.shape[:2], len(down))
            _add_product(hidden, rows, down.flatten(1).t(), alpha=scale, beta=0)
        else:
            hidden = _rows(base, F.conv2d(x, down, None, *geometry(base)).mul_(scale))
        mask = None
        if draw_mask is not None:
            mask = draw_mask(hidden)
            hidden.mul_(mask)
        _add_product(_rows(base, out), hidden, up.flatten(1).t())
        # What lies in flat buffers is there anyway.
        ctx.save_for_backward(x, hidden, mask, *([] if ctx.factors else [down, up]))
        ctx.base, ctx.scale = base, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, mask, *saved = ctx.saved_tensors
        down, up = ctx.factors or saved
        with torch.autocast(autocast_device(x), enabled=False):
            grad = _rows(ctx.base, grad_out)
            grad_hidden = torch.empty_like(hidden)
            _add_product(grad_hidden, grad, up.flatten(1), alpha=ctx.scale, beta=0)
            if mask is not None:
                grad_hidden.mul_(mask)
            grad_up = _contract(grad, hidden, up.shape, ctx.sums[1])
            gradients = _pointwise_gradients if is_pointwise(ctx.base) else _conv_gradients
            grad_x, grad_down = gradients(ctx, x, down, grad_out, grad_hidden)
        return grad_x, grad_down, grad_up, None, None, None, None


def _pointwise_gradients(
    ctx: Any, x: Tensor, down: Tensor, grad_out: Tensor, grad_hidden: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the down factor, where they are wanted."""
    base = ctx.base
    grad_down = _contract(grad_hidden, _rows(base, x), down.shape, ctx.sums[0])
    if not ctx.needs_input_grad[0]:
        return None, grad_down
    channels_last = isinstance(base, nn.Conv2d) and x.is_contiguous(memory_format=torch.channels_last)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _add_product(_rows(base, grad_x), _rows(base, grad_out), base.weight.to(x.dtype).flatten(1), beta=0)
    _add_product(_rows(base, grad_x), grad_hidden, down.flatten(1))
    return grad_x, grad_down


def _conv_gradients(
    ctx: Any, x: Tensor, down: Tensor, grad_out: Tensor, grad_hidden: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the down factor, where they are wanted."""
    base, wants_x, sums = ctx.base, ctx.needs_input_grad[0], ctx.sums[0]
    options = conv_options(base)
    grad_images = grad_hidden.transpose(1, 2).view(len(x), -1, *grad_out.shape[2:])
    grad_x, grad_down, _ = conv_backward(grad_images, x, down, None, *options, (wants_x, True, False))
    if wants_x:
        grad_x += conv_backward(grad_out, x, base.weight.to(x.dtype), None, *options, (True, False, False))[0]
    if sums is None:
        return grad_x, grad_down
    sums.add_(grad_down)
    return grad_x, None


conv_backward = torch.ops.aten.convolution_backward
"""Gradients of input, weight and bias of a convolution, by gradient, input, weight, bias' size, options and a mask."""


low_rank_operation = cast("LowRankOperation", _LowRank.apply)
"""The operation, for each kind of layer that can be adapted."""


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is linear or a 1×1 convolution that keeps height and width."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)
    return isinstance(layer, nn.Linear)


def autocast_device(tensor: Tensor) -> str:
    """The kind of device whose autocast state a tensor heeds; those without memory (`meta`) count as on a CPU."""
    return "cpu" if tensor.is_meta else tensor.device.type


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's if it is on, else the input's."""
    device = autocast_device(x)
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def can_use(flat: FlatView, dtype: torch.dtype) -> bool:
    """Whether to compute in this dtype with a parameter in flat buffers."""
    # Compilers cannot trace what a backward pass writes elsewhere.
    return flat.weight.dtype == dtype and not torch.compiler.is_compiling()


def base_weights(base: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a base layer, which autocast casts; without it they must be of the input's dtype."""
    weight, bias = base.weight, base.bias
    if weight.dtype != dtype and torch.is_autocast_enabled(autocast_device(weight)):
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    return weight, bias


def geometry(conv: Layer) -> tuple[Any, ...]:
    """Stride, padding and dilation of a convolution."""
    return conv.stride, conv.padding, conv.dilation


def conv_options(conv: Layer) -> tuple[Any, ...]:
    """What `conv_backward` is told of a convolution behind the size of its bias."""
    return (*geometry(conv), False, (0, 0), 1)


def _rows(layer: Layer, tensor: Tensor) -> Tensor:
    """What a layer reads or puts out, [B, channels, h, w] or [B, …, channels], as rows [B, L, channels].

    A view of what a layer puts out.
    """
    if isinstance(layer, nn.Conv2d):
        return tensor.flatten(2).transpose(1, 2)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _add_product(out: Tensor, rows: Tensor, matrix: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Out ← beta·out + alpha·rows·matrix, of [B, L, m], [B, L, k] and [k, m]; as one multiplication where it can be."""
    if len(rows) == 1 or (out.is_contiguous() and rows.is_contiguous()):
        out.flatten(0, 1).addmm_(rows.flatten(0, 1), matrix, alpha=alpha, beta=beta)
    elif out.is_contiguous():
        out.baddbmm_(rows, matrix.expand(len(rows), -1, -1), alpha=alpha, beta=beta)
    else:
        # With a result that is transposed in memory, baddbmm_ is thousands of times slower in bfloat16 on processors.
        transposed, matrices = rows.transpose(1, 2), matrix.t().expand(len(rows), -1, -1)
        out.transpose(1, 2).baddbmm_(matrices, transposed, alpha=alpha, beta=beta)


def _contract(left: Tensor, right: Tensor, shape: torch.Size, sums: Tensor | None) -> Tensor | None:
    """Σ over images and positions of left·rightᵀ, of [B, L, m] and [B, L, k], in a shape that holds [m, k].

    None where there is a tensor of that shape to add it to.
    """
    if len(left) > 1 and not (left.is_contiguous() and right.is_contiguous()):
        product = (left.transpose(1, 2) @ right).sum(0)
        if sums is None:
            return product.view(shape)
        sums.view_as(product).add_(product)
        return None
    left, right = left.flatten(0, 1).t(), right.flatten(0, 1)
    if sums is None:
        return (left @ right).view(shape)
    add_product(sums.view(len(left), -1), left, right)
    return None
