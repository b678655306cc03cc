"""The optimizer's evaluation weights, for as long as something reads them.

Schedule-free optimizers (Defazio et al., 2024, arXiv:2405.15682) train at other weights than those that
are worth keeping; their `eval` and `train` methods go from one to the other and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer


def begin_training(optimizer: Optimizer) -> None:
    """Tell an optimizer that has evaluation weights that the steps begin, which it wants to know."""
    begin = getattr(optimizer, "train", None)
    if begin is not None:
        begin()


class EvaluationWeights:
    """Takes the parameters of an optimizer to where it wants them read, and back, for as long as something lasts."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._to_evaluation = getattr(optimizer, "eval", None)
        self._to_training = getattr(optimizer, "train", None)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._kept: list[Tensor] | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Put the parameters where the optimizer wants them read; afterwards they are as before, bit for bit."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside `reading`, put everything back as it is trained; afterwards it is to be read again, bit for bit."""
        interrupted = self._kept is not None
        self._end()
        try:
            yield
        finally:
            if interrupted:
                self._begin()

    def _begin(self) -> None:
        if self._to_evaluation and self._to_training:
            # The way back is arithmetic too, and rounds: the copies make it exact.
            self._kept = [parameter.detach().clone() for parameter in self._parameters]
            self._to_evaluation()

    def _end(self) -> None:
        if self._kept is None or not self._to_training:
            return
        self._to_training()
        with torch.no_grad():
            for parameter, before in zip(self._parameters, self._kept, strict=True):
                parameter.copy_(before)
        self._kept = None
