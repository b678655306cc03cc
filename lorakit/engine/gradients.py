"""The gradients of all trained parameters in one flat buffer.

One buffer makes zeroing, reducing over processes, and clipping one operation each, without asking
the device for a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.engine.processes import Processes


class FlatGradients:
    """One float32 buffer that the parameters' gradients are views of."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Allocate the buffer on the parameters' device and set each gradient to its share of it."""
        self.parameters = parameters
        """What is trained."""
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        """The gradients, float32, one after the other."""
        start = 0
        for parameter in parameters:
            share = self.buffer[start : start + parameter.numel()]
            parameter.grad = share.view_as(parameter)
            start += parameter.numel()

    def zero(self) -> None:
        """Start the next step."""
        self.buffer.zero_()

    def sum_over(self, processes: Processes) -> None:
        """Add up the gradients of all processes."""
        processes.sum(self.buffer)

    def clip(self, max_norm: float) -> Tensor:
        """Scale down to the L2 norm `max_norm` where it is exceeded; the norm before, a scalar on the device.

        With a `max_norm` of 0 nothing is scaled.
        """
        norm: Tensor = torch.linalg.vector_norm(self.buffer)
        if max_norm > 0:
            self.buffer.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
