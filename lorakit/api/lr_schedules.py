"""Learning-rate schedules with a warm-up: a subclass of `WarmupConfig` defines only what follows it.

Steps are counted from 0. During a warm-up of w steps, the factor of step t is t/w: step 0 has learning
rate 0, and step w is the first with the full learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import LRSchedulerConfig
from lorakit.errors import Problem

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def resolve_steps(length: float, total_steps: int) -> int:
    """A length in a config as a number of steps; below 1 it is a share of the run, rounded down."""
    return int(length * (total_steps if length < 1 else 1))


def check_steps(key: str, length: float) -> Iterator[Problem]:
    """A problem if a length is neither whole steps nor a share."""
    if length > 1 and length % 1:
        yield Problem(key, f"must be whole steps, or a share below 1, not {length}")


def check_warmup(key: str, warmup: float, total_steps: int) -> Iterator[Problem]:
    """A problem if a warm-up is as long as the run, which then never reaches the full learning rate."""
    if total_steps and resolve_steps(warmup, total_steps) >= total_steps:
        message = f"{warmup:g} is a warm-up as long as the run of {total_steps} steps, or longer"
        yield Problem(key, message, f"the full learning rate is never reached; {max(1, total_steps // 20)} is usual")


def cosine_factor(progress: float, count: int = 1, lowest: float = 0.0) -> float:
    """Cosine decay: m + (1 − m)·½(1 + cos π·n·progress), where m is `lowest` and n is `count`.

    For `progress` from 0 to 1 it consists of n half waves: it falls from 1 to m, then rises again, and so on.
    """
    return lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * count * progress))


@frozen(kw_only=True)
class WarmupConfig(LRSchedulerConfig):
    """A schedule with a linear warm-up; a subclass defines the rest by overriding `factor` or `curve`."""

    warmup_steps: float = field(default=0, validator=v.ge(0))
    """Length of the linear warm-up in steps; below 1, a share of the run."""

    def factor(self, progress: float, lr: float) -> float:
        """The factor of the learning rate `lr` after `progress`, from 0 to 1, of the steps that follow the warm-up."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither factor nor curve")

    def curve(self, lr: float, warmup: int, total_steps: int) -> Callable[[int], float]:
        """The factor of the learning rate `lr` as a function of the step, for steps from `warmup` on."""
        return lambda step: self.factor(min(1.0, (step - warmup) / max(1, total_steps - warmup)), lr)

    def warnings_of_length(self, total_steps: int) -> Iterator[Problem]:
        """A warning if the warm-up is as long as the run."""
        yield from check_warmup("warmup_steps", self.warmup_steps, total_steps)

    def problems(self) -> Iterator[Problem]:
        """Checks that the warm-up is whole steps or a share."""
        yield from check_steps("warmup_steps", self.warmup_steps)

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule; each parameter group has a factor for its learning rate."""
        from torch.optim.lr_scheduler import LambdaLR

        factors = [self._factors(group["lr"], total_steps) for group in optimizer.param_groups]
        return LambdaLR(optimizer, factors)

    def _factors(self, lr: float, total_steps: int) -> Callable[[int], float]:
        warmup = resolve_steps(self.warmup_steps, total_steps)
        afterwards = self.curve(lr, warmup, total_steps)
        return lambda step: step / warmup if step < warmup else afterwards(step)
