"""The optimizer's evaluation weights, for as long as something reads them.

Schedule-free optimizers (Defazio et al., 2024, arXiv:2405.15682) train at other weights than those that
are worth keeping; their `eval` and `train` methods go from one to the other and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer


def begin_training(optimizer: Optimizer) -> None:
    """Tell an optimizer that has evaluation weights that the steps begin, which it wants to know."""
    begin = getattr(optimizer, "train", None)
    if begin is not None:
        begin()


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """Put the parameters where the optimizer wants them read; afterwards they are as before, bit for bit."""
    to_evaluation, back = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
    if to_evaluation is None or back is None:
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # The way back is arithmetic too, and rounds: the copies make it exact.
    kept = [parameter.detach().clone() for parameter in parameters]
    to_evaluation()
    try:
        yield
    finally:
        back()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)
