"""The optimizer's evaluation weights, while something saves or evaluates them.

Schedule-free optimizers (Defazio et al., 2024, arXiv:2405.15682) train other weights than those to
save; their `eval` and `train` methods switch between the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer


def begin_training(optimizer: Optimizer) -> None:
    """Put an optimizer that has evaluation weights into training mode, as it requires before the first step."""
    begin = getattr(optimizer, "train", None)
    if begin is not None:
        begin()


class EvaluationWeights:
    """Switches the parameters of an optimizer to its evaluation weights and back."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._to_evaluation = getattr(optimizer, "eval", None)
        self._to_training = getattr(optimizer, "train", None)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._trained: list[Tensor] | None = None

    @contextmanager
    def eval_weights(self) -> Iterator[None]:
        """Switch to the weights to save and evaluate; afterwards the parameters are as before, bit for bit."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def train_weights(self) -> Iterator[None]:
        """Inside `eval_weights`, go back to the trained weights; afterwards to the others again, bit for bit."""
        interrupted = self._in_evaluation
        self._end()
        try:
            yield
        finally:
            if interrupted:
                self._begin()

    @property
    def _in_evaluation(self) -> bool:
        return self._trained is not None

    def _begin(self) -> None:
        if self._to_evaluation and self._to_training:
            # The way back is arithmetic too, and rounds: the copies make it exact.
            self._trained = [parameter.detach().clone() for parameter in self._parameters]
            self._to_evaluation()

    def _end(self) -> None:
        if self._trained is None or not self._to_training:
            return
        self._to_training()
        with torch.no_grad():
            for parameter, before in zip(self._parameters, self._trained, strict=True):
                parameter.copy_(before)
        self._trained = None
