"""Frozen layers whose weights take 8 bits, made whole where they are used.

A weight is kept as float8 e4m3 (Micikevicius et al., 2022, arXiv:2209.05433) with one float32 scale for
each output channel, so that the channel's largest weight is the format's largest number: a weight is
wrong by at most a sixteenth, or by a 458,752nd of the largest in its channel where that is more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from lorakit.models.layers import is_plain

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


class Float8Layer(nn.Module):
    """A layer that keeps `weight` in 8 bits, [out, …], and makes it anew whenever it is asked for."""

    stored: Tensor
    """The weight divided by `scale`, float8 [out, …]."""
    scale: Tensor
    """Float32 [out, 1, …]."""
    dtype: torch.dtype
    """The number format to compute in."""

    def store(self, weight: Tensor, device: torch.device) -> None:
        """Keep this weight, on that device."""
        self.dtype = weight.dtype
        exact = weight.detach().to(device, torch.float32)
        largest = exact.abs().amax(dim=tuple(range(1, exact.ndim)), keepdim=True)
        scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
        self.register_buffer("stored", (exact / scale).to(FLOAT8))
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The weight in the format to compute in; a new tensor each time, so changing it changes nothing."""
        return self.stored.to(self.dtype).mul_(self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers.pop(name) for name in ("stored", "scale")}
        self.dtype = fn(torch.empty((), dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers |= {name: tensor.to(fn(tensor).device) for name, tensor in kept.items() if tensor is not None}
        return self


class Float8Linear(Float8Layer, nn.Linear):  # type: ignore[override]
    """A linear layer, frozen, whose weight is kept in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """What the linear layer puts out, [..., out], for [..., in]; differentiable in x."""
        out: Tensor = _Linear.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class Float8Conv2d(Float8Layer, nn.Conv2d):  # type: ignore[override]
    """A plain 2-D convolution, frozen, whose weight is kept in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """What the convolution puts out, [B, out, h', w'], for [B, in, h, w]; differentiable in x."""
        out: Tensor = _Conv2d.apply(x, self)  # type: ignore[no-untyped-call]
        return out


def keep_in_8_bits(layer: nn.Module, device: torch.device) -> None:
    """Make a layer one that keeps its weight in 8 bits, on that device; it computes in the format it had.

    A layer that is neither linear nor a plain convolution, and one that is in 8 bits already, stays as it is.
    """
    if not is_plain(layer) or isinstance(layer, Float8Layer):
        return
    weight = layer.weight
    del layer.weight
    # Another class for the same object, so that whatever else is known of the layer need not be copied.
    layer.__class__ = Float8Linear if isinstance(layer, nn.Linear) else Float8Conv2d
    cast("Float8Layer", layer).store(weight, device)


class _Linear(Function):
    """Keeps nothing for the backward pass but the layer: autograd by itself would keep the whole weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Float8Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        return grad_out @ ctx.layer.weight.to(grad_out.dtype), None


class _Conv2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Float8Conv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        layer: Float8Conv2d = ctx.layer
        weight = layer.weight.to(grad_out.dtype)
        grad_x: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            ctx.shape, weight, grad_out, layer.stride, layer.padding, layer.dilation
        )
        return grad_x, None
