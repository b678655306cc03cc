"""The trained parameters of a network in a few flat buffers, so that each operation on all of them is one kernel.

The optimizer's parameters are float32. Layers compute with a copy in the model's format, which one cast refreshes, and
backward passes add their products into flat sums, so that autograd neither casts nor accumulates single gradients.

N is the number of trained elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor, nn

from lorakit.networks.network import ParameterGroup

if TYPE_CHECKING:
    from lorakit.api.components import OptimizerConfig


@frozen
class FlatView:
    """A parameter in the format in which its layer computes; both are views of flat buffers, of the same shape."""

    weight: Tensor
    """Its elements, as they were when the buffers were last refreshed."""
    gradient: Tensor
    """What a backward pass adds its gradient to, in this format or in float32."""


class FlatParameters:
    """The trained parameters of a network and their gradients, one after the other."""

    def __init__(self, groups: Sequence[ParameterGroup], dtype: torch.dtype = torch.float32) -> None:
        """Make parameters of groups, and their gradients, views of new buffers; layers compute in `dtype`.

        The parameters must be float32, and on one device.
        """
        self.groups = tuple(groups)
        """The groups, in the order of the buffers."""
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        """The parameters, in the order of the buffers."""
        self.sizes = [sum(parameter.numel() for parameter in group.parameters) for group in groups]
        """Elements of each group."""
        self.weights = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        """What the optimizer trains, float32 [N]."""
        self.gradients = torch.zeros_like(self.weights)
        """Their gradients over a step, float32 [N]."""
        # In float32 nothing is copied; where products can be summed in float32, no other sums are needed.
        self._copy = self.weights if dtype == torch.float32 else self.weights.to(dtype)
        self._sums = self.gradients if _sums_float32(self.weights.device, dtype) else torch.zeros_like(self._copy)
        self._starts: dict[nn.Parameter, int] = {}
        start = 0
        for parameter in self.parameters:
            end = start + parameter.numel()
            parameter.data = self.weights[start:end].view_as(parameter)
            parameter.grad = self.gradients[start:end].view_as(parameter)
            self._starts[parameter], start = start, end

    def view(self, parameter: nn.Parameter) -> FlatView | None:
        """A parameter as its layer computes with it; None for one that is not trained."""
        start = self._starts.get(parameter)
        return None if start is None else self._view(start, parameter.shape)

    def stacked(self, parameters: Sequence[nn.Parameter]) -> FlatView:
        """Parameters of one shape that follow one another in the buffers, [n, ...].

        Raises ValueError where they do not, and KeyError where one of them is not trained.
        """
        start, shape = self._starts[parameters[0]], parameters[0].shape
        if [self._starts[own] - start for own in parameters] != [n * shape.numel() for n in range(len(parameters))]:
            raise ValueError("the parameters do not follow one another")
        return self._view(start, torch.Size((len(parameters), *shape)))

    def _view(self, start: int, shape: torch.Size) -> FlatView:
        end = start + shape.numel()
        return FlatView(self._copy[start:end].view(shape), self._sums[start:end].view(shape))

    def refresh(self) -> None:
        """Let layers compute with the parameters as they are now."""
        if self._copy is not self.weights:
            self._copy.copy_(self.weights)

    def collect(self) -> None:
        """Add what backward passes have left since the last call to the gradients."""
        if self._sums is not self.gradients:
            self.gradients.add_(self._sums)
            self._sums.zero_()

    def groups_for(self, optimizer: OptimizerConfig) -> Sequence[ParameterGroup]:
        """The groups as an optimizer takes them: one that is elementwise gets each group as a single parameter."""
        if not optimizer.elementwise:
            return self.groups
        found = []
        parts = (torch.split(buffer, self.sizes) for buffer in (self.weights, self.gradients))
        for group, weights, gradients in zip(self.groups, *parts, strict=True):
            parameter = nn.Parameter(weights)
            parameter.grad = gradients
            found.append(ParameterGroup(group.name, group.part, (parameter,), group.lr))
        return found


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Out ← out + left·right, of matrices, or stacks of as many as `out` has; float32 sums of any format."""
    add = torch.addmm if out.ndim == 2 else torch.baddbmm
    if out.dtype == left.dtype:
        add(out, left, right, out=out)
    else:
        add(out, left, right, out_dtype=out.dtype, out=out)


def _sums_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_product` can sum products of this format in float32 on a device."""
    if dtype == torch.float32:
        return True
    for shape in ((8, 8), (2, 8, 8)):
        out, ones = torch.ones(shape, device=device), torch.ones(shape, dtype=dtype, device=device)
        try:
            add_product(out, ones, ones)
            if not out.eq(9).all():
                return False
        except (RuntimeError, TypeError):  # no such operation on this device, or in this build of PyTorch
            return False
    return True
