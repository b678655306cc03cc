"""Linear layers with LoRA adapters that read the same input, as one operation: queries, keys and values, for example.

Of n layers y_i = W_i·x + b_i + s·U_i·(D_i·x) with factors of the same shapes, which lie side by side in flat buffers:

    h = s·x·[D_1; …; D_n]ᵀ                      one product, [T, n·r]
    y_i += h_i·U_iᵀ                             one batched product

and backward, of their gradients g_i side by side:

    ĝ_i = s·g_i·U_i                             one batched product, [T, n·r]
    ∂U_i += g_iᵀ·h_i                            one batched product
    [∂D_1; …; ∂D_n] += ĝᵀ·x                     one product
    ∂x = Σ g_i·W_i + ĝ·[D_1; …; D_n]            two products

So are W_i·x, where base weights are parameters in memory: these are laid side by side. What is computed for all layers
when the first of them is called is handed out when the others are. `lorakit.networks.lora_function` computes the same
for one layer, and is what other cases fall back to.

Shapes: T rows of the input, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.networks.flat_parameters import FlatParameters, add_product
from lorakit.networks.lora_function import base_weights, can_use, compute_dtype

if TYPE_CHECKING:
    from lorakit.networks.lora import LoRAModule


class SharedInput:
    """Adapters of n linear layers whose inputs are one tensor, whose factors are alike, and which scale alike."""

    def __init__(self, adapters: Sequence[LoRAModule], flat: FlatParameters) -> None:
        """The adapters in the order in which they are called; their factors must lie side by side in `flat`."""
        self.adapters = adapters
        self.bases = [cast("nn.Linear", adapter.base) for adapter in adapters]
        self.down = flat.stacked([adapter.lora_down for adapter in adapters])
        """Down factors, [n, r, I]."""
        self.up = flat.stacked([adapter.lora_up for adapter in adapters])
        """Up factors, [n, O, r]."""
        self._weights = side_by_side([base._parameters.get("weight") for base in self.bases])
        self._biases = side_by_side([base._parameters.get("bias") for base in self.bases])
        self._input: Tensor | None = None
        self._outputs: dict[LoRAModule, Tensor] = {}

    @property
    def weights(self) -> Tensor | None:
        """Base weights, [n, O, I]; None where they could not be laid side by side, or have been moved since."""
        stacked, own = self._weights, self.bases[0]._parameters.get("weight")
        if stacked is None or own is None or own.untyped_storage()._cdata != stacked.untyped_storage()._cdata:
            return None
        return stacked

    @property
    def biases(self) -> Tensor | None:
        """Base biases, [n, 1, O], where there are `weights`; None for layers without."""
        return None if self._biases is None else self._biases.unsqueeze(1)

    def takes(self, x: Tensor) -> bool:
        """Whether the outputs for this input can be computed here."""
        return x.dtype == compute_dtype(x) and can_use(self.down, x.dtype)

    def output(self, adapter: LoRAModule, x: Tensor, scale: float) -> Tensor:
        """An adapter's output, [..., O] of [..., I]."""
        if self._input is not x or adapter not in self._outputs:
            found = _SharedInput.apply(x, adapter.lora_down, self, scale)  # type: ignore[no-untyped-call]
            self._input, self._outputs = x, dict(zip(self.adapters, found, strict=True))
        output = self._outputs.pop(adapter)
        if not self._outputs:
            self._input = None
        return output


class _SharedInput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, shared: SharedInput, scale: float) -> tuple[Tensor, ...]:
        down, up, weights = shared.down.weight, shared.up.weight, shared.weights
        count, outputs, rank = up.shape
        rows = x.reshape(-1, x.shape[-1])
        if weights is None:
            out = x.new_empty(count, len(rows), outputs)
            for own, base in zip(out, shared.bases, strict=True):
                weight, bias = base_weights(base, x.dtype)
                _product(rows, weight, bias, own)
        else:
            batches, biases = rows.expand(count, *rows.shape), shared.biases
            out = torch.bmm(batches, weights.mT) if biases is None else torch.baddbmm(biases, batches, weights.mT)
        hidden = x.new_empty(len(rows), count * rank)
        torch.addmm(hidden, rows, down.flatten(0, 1).t(), beta=0, alpha=scale, out=hidden)
        out.baddbmm_(_layers(hidden, count), up.mT)
        ctx.save_for_backward(x, hidden)
        ctx.shared, ctx.scale = shared, scale
        return tuple(own.view(*x.shape[:-1], outputs) for own in out.unbind())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        shared: SharedInput = ctx.shared
        down, up = shared.down, shared.up
        count, outputs, _ = up.weight.shape
        grad = torch.cat([own.reshape(-1, outputs) for own in gradients], dim=1)
        grad_layers, hidden_layers = _layers(grad, count), _layers(hidden, count)
        grad_hidden = torch.empty_like(hidden)
        into = _layers(grad_hidden, count)
        torch.baddbmm(into, grad_layers, up.weight, beta=0, alpha=ctx.scale, out=into)
        add_product(up.gradient, grad_layers.mT, hidden_layers)
        add_product(down.gradient.flatten(0, 1), grad_hidden.t(), rows)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if shared.weights is None:
            grad_x = torch.empty_like(rows)
            for number, (own, base) in enumerate(zip(grad_layers, shared.bases, strict=True)):
                grad_x.addmm_(own, base.weight.to(rows.dtype), beta=min(number, 1))
        else:
            grad_x = grad @ shared.weights.flatten(0, 1)
        grad_x.addmm_(grad_hidden, down.weight.flatten(0, 1))
        return grad_x.view(x.shape), None, None, None


def side_by_side(parameters: Sequence[nn.Parameter | None]) -> Tensor | None:
    """Lay parameters of one shape side by side in memory, [n, ...].

    None where one is missing or lies in a mapped file, which takes no memory as a copy would, or where dtypes differ.
    """
    found = [own.detach() for own in parameters if own is not None]
    kinds = {(own.shape, own.dtype, own.device) for own in found}
    if len(found) < len(parameters) or len(kinds) > 1 or any(map(_is_mapped, found)):
        return None
    stacked = torch.stack(found)
    for own, place in zip(parameters, stacked.unbind(), strict=True):
        if own is not None:
            own.data = place
    return stacked


def _is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is not PyTorch's own, but that of a mapped file, for example."""
    return not tensor.untyped_storage().resizable()


def _layers(rows: Tensor, count: int) -> Tensor:
    """[n, T, k] of rows [T, n·k]."""
    return rows.view(len(rows), count, -1).transpose(0, 1)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
