"""Frozen layers whose weights take fewer bits or are kept elsewhere, made whole where they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from lorakit.models.memory.layers import is_adaptable
from lorakit.models.memory.weight_formats import FORMATS, WeightFormat


class QuantizedLayer(nn.Module):
    """A layer that keeps its weight in another form or place, and makes it anew whenever it is asked for."""

    format: WeightFormat
    """The form."""
    shape: tuple[int, ...]
    """The weight's shape, [out, …]."""
    dtype: torch.dtype
    """The number format to compute in."""
    source: Callable[[], Mapping[str, Tensor]] | None = None
    """Brings what is kept of the weight to the device, for use at once; None where the layer has it as buffers."""

    def store(self, weight: Tensor, device: torch.device, weight_format: WeightFormat) -> None:
        """Keep this weight, in that form, on that device."""
        self.format, self.shape, self.dtype = weight_format, tuple(weight.shape), weight.dtype
        for name, tensor in weight_format.pack(weight.detach().to(device)).items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """The weight in the format to compute in; a new tensor each time, so changing it changes nothing."""
        kept = self._buffers if self.source is None else self.source()
        return self.format.unpack(kept, self.shape, self.dtype)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        self._buffers.clear()
        self.dtype = fn(torch.empty((), dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers |= {name: tensor.to(fn(tensor).device) for name, tensor in kept.items() if tensor is not None}
        return self


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[override]
    """A linear layer, frozen, whose weight is kept in another form."""

    def forward(self, x: Tensor) -> Tensor:
        """What the linear layer puts out, [..., out], for [..., in]; differentiable in x."""
        out: Tensor = _Linear.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override]
    """A plain 2-D convolution, frozen, whose weight is kept in another form."""

    def forward(self, x: Tensor) -> Tensor:
        """What the convolution puts out, [B, out, h', w'], for [B, in, h, w]; differentiable in x."""
        out: Tensor = _Conv2d.apply(x, self)  # type: ignore[no-untyped-call]
        return out


def quantize(layer: nn.Module, weight_format: str, device: torch.device) -> None:
    """Make a layer one that keeps its weight in a form of `FORMATS`, on that device; it computes in the format it had.

    A layer that is neither linear nor a plain convolution, and one that keeps its weight so already, stays as it is.
    """
    convert_layer(layer, FORMATS[weight_format], device)


def convert_layer(layer: nn.Module, weight_format: WeightFormat, device: torch.device) -> None:
    """Make a layer one that keeps its weight in that form, on that device, as `quantize` does."""
    if not is_adaptable(layer) or isinstance(layer, QuantizedLayer):
        return
    weight = layer.weight
    del layer.weight
    # Another class for the same object, so that whatever else is known of the layer need not be copied.
    layer.__class__ = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    cast("QuantizedLayer", layer).store(weight, device, weight_format)


class _Linear(Function):
    """Keeps nothing for the backward pass but the layer: autograd by itself would keep the whole weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        return grad_out @ ctx.layer.weight.to(grad_out.dtype), None


class _Conv2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        layer: QuantizedConv2d = ctx.layer
        weight = layer.weight.to(grad_out.dtype)
        grad_x: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            ctx.shape, weight, grad_out, layer.stride, layer.padding, layer.dilation
        )
        return grad_x, None
