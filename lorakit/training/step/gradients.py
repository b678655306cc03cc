"""The gradients of all trained parameters in one flat buffer.

One buffer makes zeroing, reducing over processes, and clipping one operation each, without asking
the device for a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.networks.flat_parameters import FlatParameters
from lorakit.training.runtime.distributed import Distributed


class FlatGradients:
    """The gradients of a step, from zero to clipped."""

    def __init__(self, flat: FlatParameters) -> None:
        self.parameters = flat.parameters
        """What is trained."""
        self.buffer = flat.gradients
        """The gradients, float32, one after the other."""
        self._parts = torch.split(self.buffer, flat.sizes)
        self.groups = tuple(group.name for group in flat.groups)
        """Names of the groups, in the order of `norms`."""
        self.norms = self.buffer.new_zeros(len(flat.sizes))
        """L2 norm of each group's gradients as they were last clipped, [G]."""

    def zero(self) -> None:
        """Start the next step."""
        self.buffer.zero_()

    def all_reduce(self, processes: Distributed, *, in_bf16: bool = False) -> None:
        """Sum the gradients over all processes, in float32 or in bfloat16."""
        processes.all_reduce_sum(self.buffer, torch.bfloat16 if in_bf16 else None)

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
