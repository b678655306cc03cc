"""The learning-rate schedule `polynomial`."""

from __future__ import annotations

import math

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import WarmupConfig


@frozen(kw_only=True)
class PolynomialConfig(WarmupConfig):
    """A learning rate that falls to `lr_end` along a power of the remaining share of the run."""

    name = "polynomial"

    power: float = field(default=1.0, validator=v.gt(0))
    """1 is a straight line; with more, the learning rate falls earlier."""
    lr_end: float = field(default=1e-7, validator=v.ge(0))
    """The learning rate at the end of the run; parameters whose own is no higher keep theirs."""

    def factor(self, progress: float, lr: float) -> float:
        """(lr_end + (lr − lr_end)·(1 − progress)^power) / lr."""
        if lr <= self.lr_end:
            return 1.0
        return (self.lr_end + (lr - self.lr_end) * math.pow(1.0 - progress, self.power)) / lr


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """Polynomial decay."""
    return [PolynomialConfig]
