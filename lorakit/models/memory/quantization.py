"""Frozen layers whose weights are quantized or offloaded, and restored where they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeGuard, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from lorakit.models.memory.weight_formats import FORMATS, WeightFormat


def is_adaptable(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a layer is linear or a 2-D convolution that is ungrouped and padded with zeros, if at all."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


class QuantizedLayer(nn.Module):
    """A layer that stores its weight in another format or place, and restores it at each use."""

    format: WeightFormat
    """How the weight is stored."""
    shape: tuple[int, ...]
    """The weight's shape, [out, …]."""
    dtype: torch.dtype
    """The dtype to compute in."""
    source: Callable[[], Mapping[str, Tensor]] | None = None
    """Copies the stored tensors to the device, for immediate use; None where the layer has them as buffers."""

    def store(self, weight: Tensor, device: torch.device, weight_format: WeightFormat) -> None:
        """Store this weight in a format, on a device."""
        self.format, self.shape, self.dtype = weight_format, tuple(weight.shape), weight.dtype
        for name, tensor in weight_format.pack(weight.detach().to(device)).items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """The weight in the dtype to compute in; a new tensor each time, so changing it has no effect."""
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
    """A frozen linear layer whose weight is stored in another format."""

    def forward(self, x: Tensor) -> Tensor:
        """What the linear layer puts out, [..., out], for [..., in]; differentiable in x."""
        out: Tensor = _Linear.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override]
    """A frozen 2-D convolution whose weight is stored in another format."""

    def forward(self, x: Tensor) -> Tensor:
        """What the convolution puts out, [B, out, h', w'], for [B, in, h, w]; differentiable in x."""
        out: Tensor = _Conv2d.apply(x, self)  # type: ignore[no-untyped-call]
        return out


def quantize(layer: nn.Module, weight_format: str, device: torch.device) -> None:
    """Let a layer store its weight in one of `FORMATS`, on that device; it computes in the dtype it had.

    Layers that are not adaptable, and those that are quantized already, stay as they are.
    """
    convert_layer(layer, FORMATS[weight_format], device)


def convert_layer(layer: nn.Module, weight_format: WeightFormat, device: torch.device) -> None:
    """Let a layer store its weight in that format, on that device, as `quantize` does."""
    if not is_adaptable(layer) or isinstance(layer, QuantizedLayer):
        return
    weight = layer.weight
    del layer.weight
    # Another class for the same object, so that whatever else is known of the layer need not be copied.
    layer.__class__ = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    cast("QuantizedLayer", layer).store(weight, device, weight_format)


class _Linear(Function):
    """Saves nothing for the backward pass but the layer; autograd alone would save the whole weight."""

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
