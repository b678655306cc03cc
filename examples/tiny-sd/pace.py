"""How training proceeds: how long, at what learning rate, and what mean of the weights is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import torch
from attrs import define, field
from torch import Tensor, nn


@define
class Budget:
    """How long a part is trained: a number of steps, which is reproducible, or minutes if given, which is not."""

    steps: int
    minutes: float | None = None
    done: int = 0
    """Steps made."""
    _start: float = field(factory=monotonic)
    _told: float = field(factory=monotonic)

    def progress(self) -> float:
        """How much of the budget is spent, from 0 to 1."""
        if self.minutes is None:
            return self.done / self.steps
        return (monotonic() - self._start) / 60 / self.minutes

    def is_time_to_tell(self) -> bool:
        """Whether half a minute has passed since this was last true, or the budget is spent."""
        now = monotonic()
        if now - self._told < 30 and self.progress() < 1:
            return False
        self._told = now
        return True

    def __str__(self) -> str:
        return f"step {self.done}, {monotonic() - self._start:.0f} s"


def set_rate(optimizer: torch.optim.Optimizer, peak: float, budget: Budget, warmup: int = 100) -> None:
    """Set the learning rate: a linear rise over the warm-up, then half a cosine down to a hundredth of the peak."""
    fall = (1 + math.cos(math.pi * min(budget.progress(), 1.0))) / 2
    for group in optimizer.param_groups:
        group["lr"] = peak * min((budget.done + 1) / warmup, 1.0) * (0.01 + 0.99 * fall)


class Average:
    """A running mean of a module's trained weights, which paints better than the last of them."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.means: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's weights into the mean; early ones count less and less."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        torch._foreach_lerp_(list(self.means.values()), trained, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Make the mean the module's weights."""
        for name, parameter in self.module.named_parameters():
            if name in self.means:
                parameter.copy_(self.means[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the mean the module's weights for a while."""
        trained = {name: own.detach().clone() for name, own in self.module.named_parameters() if name in self.means}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.module.named_parameters():
                    if name in trained:
                        parameter.copy_(trained[name])
