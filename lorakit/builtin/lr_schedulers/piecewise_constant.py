"""The learning-rate schedule `piecewise_constant`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import resolve_steps
from lorakit.errors import Problem

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

_NUMBER = r"\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+(?:e-?\d+)?"
_RULES = re.compile(rf"(?:(?:{_NUMBER}):(?:\d+|0?\.\d+),)*(?:{_NUMBER})")


@frozen(kw_only=True)
class PiecewiseConstantConfig(LRSchedulerConfig):
    """A learning rate that goes from one level to the next at given steps."""

    name = "piecewise_constant"

    step_rules: str
    """Factors of the learning rate, each with the step that ends it, or below 1 the share; the last one with none.

    `"1:10,0.1:20,0.005"` is the whole learning rate for steps 0 to 9, a tenth for 10 to 19, and then 0.005 of it."""

    def levels(self, total_steps: int) -> list[tuple[int, float]]:
        """The step that ends each level, and the level's factor; the last one has no end in the run."""
        *rules, last = self.step_rules.replace(" ", "").split(",")
        pairs = [rule.split(":") for rule in rules]
        levels = [(resolve_steps(float(end), total_steps), float(factor)) for factor, end in pairs]
        return [*sorted(levels), (total_steps + 1, float(last))]

    def problems(self) -> Iterator[Problem]:
        """Says so if the rules cannot be read."""
        if not _RULES.fullmatch(self.step_rules.replace(" ", "")):
            hint = 'such as "1:10,0.1:20,0.005"'
            yield Problem("step_rules", f"must be FACTOR:STEP pairs and a last FACTOR, not {self.step_rules!r}", hint)

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule, the same for all parameter groups."""
        from torch.optim.lr_scheduler import LambdaLR

        levels = self.levels(total_steps)
        return LambdaLR(optimizer, lambda step: next((level for end, level in levels if step < end), levels[-1][1]))


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """Levels."""
    return [PiecewiseConstantConfig]
