"""The learning-rate schedule `linear`."""

from __future__ import annotations

from attrs import frozen

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import WarmupConfig


@frozen(kw_only=True)
class LinearConfig(WarmupConfig):
    """A learning rate that falls to zero in a straight line."""

    name = "linear"

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """1 − progress."""
        return 1.0 - progress


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """Linear decay."""
    return [LinearConfig]
