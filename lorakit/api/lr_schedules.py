"""Learning-rate schedules that begin with a warm-up: what a component has to say is only what follows it.

Steps are counted from 0. Over a warm-up of w steps, the factor of step t is t/w: the first step has
learning rate 0, and step w is the first with the whole one. Without a warm-up, that is the first step.
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
    """A length as a config has it, in steps: below 1 it is a share of the run, rounded down."""
    return int(length * (total_steps if length < 1 else 1))


def check_steps(key: str, length: float) -> Iterator[Problem]:
    """Says so if a length is neither whole steps nor a share."""
    if length > 1 and length % 1:
        yield Problem(key, f"must be whole steps, or a share below 1, not {length}")


def check_warmup(key: str, warmup: float, total_steps: int) -> Iterator[Problem]:
    """Says so if a warm-up takes the whole run, which then ends before the learning rate is reached."""
    if total_steps and resolve_steps(warmup, total_steps) >= total_steps:
        message = f"{warmup:g} is a warm-up as long as the run of {total_steps} steps, or longer"
        yield Problem(key, message, f"the learning rate is never reached; {max(1, total_steps // 20)} would be usual")


def cosine_factor(progress: float, count: int = 1, lowest: float = 0.0) -> float:
    """A cosine that falls from 1 to m as `progress` goes from 0 to 1, and rises again in every second half wave.

    m + (1 − m)·½(1 + cos π·n·progress), with m for `lowest` and n for `count`.
    """
    return lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * count * progress))


@frozen(kw_only=True)
class WarmupConfig(LRSchedulerConfig):
    """A schedule that begins with a linear warm-up; a subclass says how it goes on, by `factor` or by `curve`."""

    warmup_steps: float = field(default=0, validator=v.ge(0))
    """Steps over which the learning rate rises from zero; below 1, a share of the run."""

    def factor(self, progress: float, lr: float) -> float:
        """What multiplies the learning rate `lr` once `progress`, 0 to 1, of the steps after the warm-up is done."""
        raise NotImplementedError(f"{type(self).__name__} does not say how the learning rate changes")

    def curve(self, lr: float, warmup: int, total_steps: int) -> Callable[[int], float]:
        """What multiplies the learning rate `lr` at each step from `warmup` on, counted from the first of the run."""
        return lambda step: self.factor(min(1.0, (step - warmup) / max(1, total_steps - warmup)), lr)

    def warnings_of_length(self, total_steps: int) -> Iterator[Problem]:
        """Says so if the warm-up is as long as the run."""
        yield from check_warmup("warmup_steps", self.warmup_steps, total_steps)

    def problems(self) -> Iterator[Problem]:
        """Says so if the warm-up is neither whole steps nor a share."""
        yield from check_steps("warmup_steps", self.warmup_steps)

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule, for each parameter group by its own learning rate."""
        from torch.optim.lr_scheduler import LambdaLR

        factors = [self._factors(group["lr"], total_steps) for group in optimizer.param_groups]
        return LambdaLR(optimizer, factors)

    def _factors(self, lr: float, total_steps: int) -> Callable[[int], float]:
        warmup = resolve_steps(self.warmup_steps, total_steps)
        afterwards = self.curve(lr, warmup, total_steps)
        return lambda step: step / warmup if step < warmup else afterwards(step)
