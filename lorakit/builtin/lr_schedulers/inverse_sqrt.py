"""The learning-rate schedule `inverse_sqrt`."""

from __future__ import annotations

import math
from collections.abc import Callable

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import WarmupConfig

TIMESCALE = 10_000


@frozen(kw_only=True)
class InverseSqrtConfig(WarmupConfig):
    """A learning rate that falls like 1/√step, and so never to zero (Zhai et al., 2022, arXiv:2106.04560)."""

    name = "inverse_sqrt"

    timescale: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Steps after which the learning rate is 1/√2 of the highest; as many as the warm-up, else 10,000, when absent."""

    def curve(self, lr: float, warmup: int, total_steps: int) -> Callable[[int], float]:  # noqa: ARG002
        """1/√(1 + (step − warmup)/timescale)."""
        timescale = self.timescale or warmup or TIMESCALE
        return lambda step: 1.0 / math.sqrt(1.0 + (step - warmup) / timescale)


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """Decay with the square root of the step."""
    return [InverseSqrtConfig]
