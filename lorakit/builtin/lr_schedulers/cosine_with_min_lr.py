"""The learning-rate schedule `cosine_with_min_lr`."""

from __future__ import annotations

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import WarmupConfig, cosine_factor


@frozen(kw_only=True)
class CosineWithMinLRConfig(WarmupConfig):
    """A learning rate that falls along half a cosine wave, but not to zero."""

    name = "cosine_with_min_lr"

    min_lr_ratio: float = field(default=0.1, validator=[v.ge(0), v.le(1)])
    """Share of the learning rate that is left at the lowest point."""
    num_cycles: int = field(default=1, validator=v.ge(1))
    """How many half waves the run consists of: with 2, the learning rate falls and rises again."""

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """Factor m + (1 − m)·½(1 + cos π·n·progress), with m for `min_lr_ratio` and n for `num_cycles`."""
        return cosine_factor(progress, self.num_cycles, self.min_lr_ratio)


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """Cosine decay to a lowest learning rate."""
    return [CosineWithMinLRConfig]
