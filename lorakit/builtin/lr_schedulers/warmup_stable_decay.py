"""The learning-rate schedule `warmup_stable_decay`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import WarmupConfig, check_steps, cosine_factor, resolve_steps
from lorakit.errors import Problem


@frozen(kw_only=True)
class WarmupStableDecayConfig(WarmupConfig):
    """A learning rate that stays the same for most of the run and falls at its end (Hu et al., 2024, arXiv:2404.06395).

    It falls along half a cosine wave.
    """

    name = "warmup_stable_decay"

    decay_steps: float = field(default=0.1, validator=v.ge(0))
    """Steps at the end of the run over which the learning rate falls; below 1, a share of the run."""
    min_lr_ratio: float = field(default=0.0, validator=[v.ge(0), v.le(1)])
    """Share of the learning rate that is left at the lowest point."""
    num_cycles: int = field(default=1, validator=v.ge(1))
    """How many half waves those steps consist of: with 2, the learning rate falls and rises again."""

    def curve(self, lr: float, warmup: int, total_steps: int) -> Callable[[int], float]:  # noqa: ARG002
        """1 until the decay; m + (1 − m)·½(1 + cos π·n·progress), m being `min_lr_ratio`, n `num_cycles`."""
        decay = resolve_steps(self.decay_steps, total_steps)
        start = max(warmup, total_steps - decay)

        def factor(step: int) -> float:
            progress = min(1.0, max(0, step - start) / max(1, decay))
            return cosine_factor(progress, self.num_cycles, self.min_lr_ratio)

        return factor

    def problems(self) -> Iterator[Problem]:
        """Says so if warm-up or decay is neither whole steps nor a share."""
        yield from super().problems()
        yield from check_steps("decay_steps", self.decay_steps)


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """A constant learning rate with a decay at the end."""
    return [WarmupStableDecayConfig]
