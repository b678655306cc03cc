"""An exponential moving average of the trained weights, which files, previews and validation then use.

After optimizer step t, counted from 1, ā ← d·ā + (1 - d)·w with d = min(decay, t / (9 + t)). The weights at the start,
which have no effect, so lose their share within some ten steps, however high the decay is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorakit.training.step.eval_weights import EvaluationWeights


class MovingAverage(EvaluationWeights):
    """Evaluation weights that are an average over the steps; those of the optimizer itself are not used."""

    def __init__(self, optimizer: Optimizer, weights: Tensor, decay: float) -> None:
        """`weights` are all that is trained, float32 [N]; the average begins with them."""
        super().__init__(optimizer)
        self.average = weights.clone()
        """The average, float32 [N]."""
        self._weights = weights
        self._decay = decay
        self._before: Tensor | None = None

    def update(self, number: int, norm: Tensor) -> None:
        """Take in the weights after a step, counted from 1; one whose norm of gradients is not finite was skipped.

        The device decides, and the host does not wait for it.
        """
        decay = min(self._decay, number / (9 + number))
        self.average.lerp_(self._weights, norm.isfinite().to(self.average.dtype) * (1 - decay))

    def state_dict(self) -> dict[str, Tensor]:
        """What a state keeps."""
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what a state kept."""
        self.average.copy_(state["average"])

    @property
    def _in_evaluation(self) -> bool:
        return self._before is not None

    @torch.no_grad()
    def _begin(self) -> None:
        self._before = self._weights.clone()
        self._weights.copy_(self.average)

    @torch.no_grad()
    def _end(self) -> None:
        if self._before is not None:
            self._weights.copy_(self._before)
            self._before = None
