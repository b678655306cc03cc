"""The gradients of all trained parameters in one flat buffer.

One buffer makes zeroing, reducing over processes, and clipping one operation each, without asking
the device for a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.networks.network import ParameterGroup
from lorakit.training.runtime.distributed import Distributed


class FlatGradients:
    """One float32 buffer that the parameters' gradients are views of."""

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        """Allocate the buffer on the parameters' device and make each gradient a view of its part of it."""
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        """What is trained."""
        self.buffer = torch.zeros(sum(p.numel() for p in self.parameters), device=self.parameters[0].device)
        """The gradients, float32, one after the other."""
        start = 0
        for parameter in self.parameters:
            part = self.buffer[start : start + parameter.numel()]
            parameter.grad = part.view_as(parameter)
            start += parameter.numel()
        sizes = [sum(p.numel() for p in group.parameters) for group in groups]
        self._parts = torch.split(self.buffer, sizes)
        self.groups = tuple(group.name for group in groups)
        """Names of the groups, in the order of `norms`."""
        self.norms = self.buffer.new_zeros(len(groups))
        """L2 norm of each group's gradients as they were last clipped, [G]."""

    def zero(self) -> None:
        """Start the next step."""
        self.buffer.zero_()

    def all_reduce(self, processes: Distributed) -> None:
        """Sum the gradients over all processes."""
        processes.all_reduce_sum(self.buffer)

    def poison_if_nonfinite(self, number: Tensor) -> None:
        """Put NaN among the gradients where a number, a scalar on the device, is not finite; else change nothing."""
        self.buffer[:1].mul_(number - number + 1)

    def clip(self, max_norm: float) -> Tensor:
        """Clip the L2 norm to `max_norm`; 0 disables clipping. Returns the norm before, a scalar on the device."""
        self.norms = torch.stack(torch._foreach_norm(self._parts))
        norm: Tensor = torch.linalg.vector_norm(self.norms)
        if max_norm > 0:
            self.buffer.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
