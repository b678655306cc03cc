"""Learning-rate schedules that begin with a warm-up: what a component has to say is only what follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.components import LRSchedulerConfig
from lorakit.errors import Problem

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@frozen(kw_only=True)
class WarmupConfig(LRSchedulerConfig):
    """A schedule that begins with a linear warm-up; a subclass says how it goes on."""

    warmup_steps: float = field(default=0, validator=v.ge(0))
    """Steps over which the learning rate rises from zero; below 1, a share of the run."""

    def factor(self, progress: float, lr: float) -> float:
        """What multiplies the learning rate `lr` once `progress`, 0 to 1, of the steps after the warm-up is done."""
        raise NotImplementedError(f"{type(self).__name__} does not say how the learning rate changes")

    def problems(self) -> Iterator[Problem]:
        """Says so if the warm-up is neither whole steps nor a share."""
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            yield Problem("warmup_steps", f"must be whole steps, or a share below 1, not {self.warmup_steps}")

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule, for each parameter group by its own learning rate."""
        from torch.optim.lr_scheduler import LambdaLR

        factors = [self._factors(group["lr"], total_steps) for group in optimizer.param_groups]
        return LambdaLR(optimizer, factors)

    def _factors(self, lr: float, total_steps: int) -> Callable[[int], float]:
        share = total_steps if self.warmup_steps < 1 else 1
        warmup = int(self.warmup_steps * share)

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            return self.factor(min(1.0, (step - warmup) / max(1, total_steps - warmup)), lr)

        return factor
