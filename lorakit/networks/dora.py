"""DoRA: a low-rank update of a layer's direction, and a trained magnitude of each of its outputs.

y = m/‖W + s·U·D‖ ∘ (W + s·U·D)·x + b, with one magnitude m and one norm for each output (Liu et al., 2024,
arXiv:2402.09353). As the paper says in section 4.3, the norm counts as a constant in the backward pass.

The norm is found without building W + s·U·D:
‖W + s·U·D‖² = ‖W‖² + 2s Σ (W·Dᵀ) ∘ U + s² Σ (U·D·Dᵀ) ∘ U, with sums over the rank, and ‖W‖² computed once.

Shapes: B images or texts, L positions in each, r rank, I inputs (times the kernel's size) and O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.networks.dropout import AdapterDropout, DropoutRates
from lorakit.networks.lora import LoRAModule
from lorakit.networks.lora_function import autocast_device, low_rank_operation


class DoRAModule(LoRAModule):
    """A DoRA adapter of a linear layer or a convolution.

    Its magnitudes are [out, 1], for convolutions [out, 1, 1, 1].
    """

    derivable = frozenset({"dora_scale"})

    base_squares: Tensor
    """Squared norms of the base layer's weights for each output, float32 [O]."""

    def __init__(self, key: str, base: nn.Module, rank: int, alpha: float, file_alpha: float | None = None) -> None:
        """An adapter with no effect yet. Raises `AdapterError` for layers of other kinds."""
        super().__init__(key, base, rank, alpha, file_alpha)
        weight = self._weight()
        self.register_buffer("base_squares", weight.square().sum(1), persistent=False)
        ones = [1] * (self.lora_down.ndim - 1)
        self.dora_scale = nn.Parameter(self.base_squares.sqrt().view(-1, *ones))
        self._draw_kept: Callable[[int], Tensor] | None = None

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Factors as LoRA's, and magnitudes that are the norms of the base layer's weights."""
        super().initialize(seed)
        self.dora_scale.copy_(self.base_squares.sqrt().view_as(self.dora_scale))

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output, or the adapted layer's, or what is `multiplier` of the way from one to the other."""
        if self.multiplier == 0:
            output: Tensor = self.base(x)
            return output
        draw_mask = self.draw_mask if self.training else None
        out = low_rank_operation(x, self.lora_down, self.lora_up, self.base, self.scale, draw_mask, self.flat)
        bias = self.base.bias
        gains = self.dora_scale.flatten() / self._norms()  # float32 [O]; [B, O] where it is left out for some images
        if self._draw_kept is not None and self.training:
            gains = torch.where(self._draw_kept(len(x))[:, None], gains, 1.0)
        if isinstance(self.base, nn.Conv2d):
            gains, bias = gains[..., None, None], None if bias is None else bias[:, None, None]
        elif gains.ndim == 2 and out.ndim == 3:
            gains = gains[:, None]
        out = cast("Tensor", _OutputScaling.apply(out, gains, bias))  # type: ignore[no-untyped-call]
        return out if self.multiplier == 1 else torch.lerp(self.base(x), out, self.multiplier)

    def use_dropout(self, dropout: AdapterDropout, rates: DropoutRates) -> None:
        """Drop at random; an adapter that is left out leaves the magnitudes as they were, too."""
        super().use_dropout(dropout, rates)
        self._draw_kept = dropout.kept if rates.module else None

    def adapter_state(self) -> dict[str, Tensor]:
        """Both factors, alpha and the magnitudes, under the name that LyCORIS gave them."""
        return {**super().adapter_state(), "dora_scale": self.dora_scale}

    @torch.no_grad()
    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over all; of a plain LoRA, magnitudes are those of its weights, so that the outputs stay the same."""
        super().load_adapter_state({"dora_scale": self.dora_scale, **tensors})
        if "dora_scale" not in tensors:
            self.dora_scale.copy_(self._norms().view_as(self.dora_scale))

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """Norms of the adapted layer's weights for each output, float32 [O]."""
        down, up = self.lora_down.flatten(1), self.lora_up.flatten(1)
        with torch.autocast(autocast_device(up), enabled=False):
            products = self._weight() @ down.t()  # [O, r]
            products = torch.addmm(products, up, down @ down.t(), beta=2, alpha=self.scale)
            squares = torch.add(self.base_squares, (products * up).sum(1), alpha=self.scale)
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def _weight(self) -> Tensor:
        """The base layer's weights, float32 [O, I]."""
        return self.base.weight.detach().flatten(1).float()


class _OutputScaling(Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, gains: Tensor, bias: Tensor | None) -> Tensor:
        """(out - bias)·gains + bias in the dtype of out, with gains and bias broadcastable to it."""
        scaled = torch.empty_like(out)
        if bias is None:
            torch.mul(out, gains, out=scaled)
        else:
            torch.addcmul((1 - gains) * bias, gains, out, out=scaled)
        ctx.save_for_backward(scaled, gains, bias)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, None]:
        scaled, gains, bias = ctx.saved_tensors
        grad_gains = None
        if ctx.needs_input_grad[1]:
            # What was multiplied by the gains is found from the result, which what comes next keeps too, as a rule.
            products = grad_out * (scaled if bias is None else scaled - bias)
            # Over the axes along which gains are broadcast, in float32.
            padded = (1,) * (products.ndim - gains.ndim) + tuple(gains.shape)
            axes = [axis for axis, size in enumerate(padded) if size == 1]
            sums = (products.sum(axes, dtype=torch.float32) if axes else products.float()).view(gains.shape)
            grad_gains = torch.where(gains == 0, 0.0, sums / gains)
        return (grad_out * gains).to(grad_out.dtype), grad_gains, None
