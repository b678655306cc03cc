"""The learning-rate schedule `constant_with_warmup`."""

from __future__ import annotations

from attrs import frozen

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import WarmupConfig


@frozen(kw_only=True)
class ConstantWithWarmupConfig(WarmupConfig):
    """A warm-up, and then the same learning rate to the end."""

    name = "constant_with_warmup"

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """1 throughout."""
        return 1.0


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """A constant learning rate after a warm-up."""
    return [ConstantWithWarmupConfig]
