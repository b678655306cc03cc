"""The learning-rate schedule `cosine`."""

from __future__ import annotations

from attrs import frozen

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import WarmupConfig, cosine_factor


@frozen(kw_only=True)
class CosineConfig(WarmupConfig):
    """A learning rate that falls to zero along half a cosine wave (Loshchilov and Hutter, 2017, arXiv:1608.03983)."""

    name = "cosine"

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """½(1 + cos π·progress)."""
        return cosine_factor(progress)


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """Cosine decay."""
    return [CosineConfig]
