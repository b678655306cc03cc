"""The learning-rate schedule `constant`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@frozen(kw_only=True)
class ConstantConfig(LRSchedulerConfig):
    """The same learning rate from the first step to the last; `constant_with_warmup` is the one with a warm-up."""

    name = "constant"
    is_constant = True

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:  # noqa: ARG002
        """A schedule that changes nothing."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, lambda _step: 1.0)


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """A constant learning rate."""
    return [ConstantConfig]
