"""A frozen layer plus a low-rank update, y = W·x + b + scale·U·(D·x), each kind of layer as one operation.

Written by hand because it is the innermost loop: the update is added to the base layer's output in
place, the activations are never copied to the factors' float32, and only the input and the rank-r
activations are kept for the backward pass. The base layer's weight is asked for in both passes, as a
layer may keep it in another form.

Shapes: N rows, that is, all positions of all images; B images or texts, L positions in each, r rank,
C input and O output channels. "Rows" are [B, L, channels], a view in either memory format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

DrawMask = Callable[[Tensor], Tensor]
"""Given the rank-r activations as rows [B, L, r], what to multiply them by, in their dtype, broadcastable to them."""

LowRankOperation = Callable[[Tensor, Tensor, Tensor, nn.Module, float, DrawMask | None], Tensor]
"""Output of input, down and up factor, base layer, scale, and dropout; differentiable in the first three."""


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: nn.Linear, *options: Any) -> Tensor:
        scale, draw_mask = options
        x, down, up, weight, bias = _cast(x, down, up, base)
        out = F.linear(x, weight, bias)
        hidden = torch.addmm(down.new_empty(()), x.reshape(-1, x.shape[-1]), down.t(), beta=0, alpha=scale)  # [N, r]
        mask = None
        if draw_mask is not None:
            rows = hidden.view(len(x), -1, len(down))
            mask = draw_mask(rows)
            rows.mul_(mask)
        out.view(-1, len(up)).addmm_(hidden, up.t())
        ctx.save_for_backward(x, hidden, down, up, mask)
        ctx.base, ctx.scale = base, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up, mask = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad = grad_out.reshape(-1, len(up))
            grad_hidden = torch.addmm(up.new_empty(()), grad, up, beta=0, alpha=ctx.scale)
            if mask is not None:
                grad_hidden.view(len(x), -1, len(down)).mul_(mask)
            grad_up = grad.t() @ hidden
            grad_down = grad_hidden.t() @ x.reshape(-1, x.shape[-1])
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ ctx.base.weight.to(grad.dtype)).addmm_(grad_hidden, down).view(x.shape)
        return grad_x, grad_down, grad_up, None, None, None


class _PointwiseConv2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: nn.Conv2d, *options: Any) -> Tensor:
        scale, draw_mask = options
        x, down, up, weight, bias = _cast(x, down, up, base)
        out = F.conv2d(x, weight, bias)
        rows = _rows(x)
        hidden = x.new_empty(*rows.shape[:2], len(down))
        _add_product(hidden, rows, down.flatten(1).t(), alpha=scale, beta=0)
        mask = None
        if draw_mask is not None:
            mask = draw_mask(hidden)
            hidden.mul_(mask)
        _add_product(_rows(out), hidden, up.flatten(1).t())
        ctx.save_for_backward(x, hidden, down, up, mask)
        ctx.base, ctx.scale = base, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up, mask = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad = _rows(grad_out)
            grad_hidden = torch.empty_like(hidden)
            _add_product(grad_hidden, grad, up.flatten(1), alpha=ctx.scale, beta=0)
            if mask is not None:
                grad_hidden.mul_(mask)
            grad_up = _contract(grad, hidden).view(up.shape)
            grad_down = _contract(grad_hidden, _rows(x)).view(down.shape)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = torch.empty_like(x, memory_format=_memory_format(x))
                _add_product(_rows(grad_x), grad, ctx.base.weight.to(x.dtype).flatten(1), beta=0)
                _add_product(_rows(grad_x), grad_hidden, down.flatten(1))
        return grad_x, grad_down, grad_up, None, None, None


class _Conv2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: nn.Conv2d, *options: Any) -> Tensor:
        scale, draw_mask = options
        x, down, up, weight, bias = _cast(x, down, up, base)
        out = F.conv2d(x, weight, bias, base.stride, base.padding, base.dilation)
        hidden = F.conv2d(x, down, None, base.stride, base.padding, base.dilation).mul_(scale)  # [B, r, h, w]
        mask = None
        if draw_mask is not None:
            mask = draw_mask(_rows(hidden))
            _rows(hidden).mul_(mask)
        _add_product(_rows(out), _rows(hidden), up.flatten(1).t())
        ctx.save_for_backward(x, hidden, down, up, mask)
        ctx.base, ctx.scale, ctx.geometry = base, scale, (base.stride, base.padding, base.dilation, False, (0, 0), 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up, mask = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad = _rows(grad_out)
            grad_hidden = torch.empty_like(hidden)
            _add_product(_rows(grad_hidden), grad, up.flatten(1), alpha=ctx.scale, beta=0)
            if mask is not None:
                _rows(grad_hidden).mul_(mask)
            grad_up = _contract(grad, _rows(hidden)).view(up.shape)
            wants_x = ctx.needs_input_grad[0]
            grad_x, grad_down, _ = _conv_backward(grad_hidden, x, down, None, *ctx.geometry, (wants_x, True, False))
            if wants_x:
                weight = ctx.base.weight.to(x.dtype)
                grad_x += _conv_backward(grad_out, x, weight, None, *ctx.geometry, (True, False, False))[0]
        return grad_x, grad_down, grad_up, None, None, None


_conv_backward = torch.ops.aten.convolution_backward


def operation_for(base: nn.Linear | nn.Conv2d) -> LowRankOperation:
    """The operation for a kind of layer."""
    function: type[Function] = _Linear
    if isinstance(base, nn.Conv2d):
        function = _PointwiseConv2d if is_pointwise(base) else _Conv2d
    return cast("LowRankOperation", function.apply)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is linear or a 1×1 convolution that keeps height and width."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)
    return isinstance(layer, nn.Linear)


def _cast(
    x: Tensor, down: Tensor, up: Tensor, base: nn.Linear | nn.Conv2d
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Input, factors, base weight and bias in the dtype to compute in: autocast's if it is on, else the input's."""
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    weight, bias = base.weight, base.bias
    if weight.dtype != dtype and torch.is_autocast_enabled(device):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return x.to(dtype), down.to(dtype), up.to(dtype), weight, bias


def _rows(images: Tensor) -> Tensor:
    """[B, channels, h, w] as [B, h·w, channels]; a view of what a convolution puts out."""
    return images.flatten(2).transpose(1, 2)


def _memory_format(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _add_product(out: Tensor, rows: Tensor, matrix: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Out ← beta·out + alpha·rows·matrix, of [B, L, m], [B, L, k] and [k, m]; as one multiplication where it can be."""
    if len(rows) == 1 or (out.is_contiguous() and rows.is_contiguous()):
        out.flatten(0, 1).addmm_(rows.flatten(0, 1), matrix, alpha=alpha, beta=beta)
    else:
        out.baddbmm_(rows, matrix.expand(len(rows), -1, -1), alpha=alpha, beta=beta)


def _contract(left: Tensor, right: Tensor) -> Tensor:
    """Σ over images and positions of left·rightᵀ: [m, k] of [B, L, m] and [B, L, k]."""
    if len(left) == 1 or (left.is_contiguous() and right.is_contiguous()):
        return left.flatten(0, 1).t() @ right.flatten(0, 1)
    return (left.transpose(1, 2) @ right).sum(0)
