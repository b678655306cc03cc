"""Loss and gradient norm of each step, kept on the device and read some steps at a time.

Reading a number makes the host wait for the device, so on an accelerator the numbers of several
steps are read at once. That is also when a loss that is not finite is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lorakit.api.observer import StepMetrics
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.schedule import Step
from lorakit.training.step.nan_guard import DivergenceMonitor

SYNC_EVERY = 10
"""Steps whose numbers are read together on an accelerator."""


def effective_lr(group: Mapping[str, Any]) -> float:
    """The learning rate of the last step of an optimizer's parameter group.

    Learning-rate-free optimizers keep a factor under `d`; schedule-free ones, the rate under `scheduled_lr`.
    """
    factor = group.get("d", 1.0)
    # A tensor would have to be waited for.
    return float(group.get("scheduled_lr", group["lr"])) * (factor if isinstance(factor, float) else 1.0)


class AsyncMetrics:
    """Collects the numbers of steps and reads them together."""

    def __init__(
        self, processes: Distributed, monitor: DivergenceMonitor, report: Callable[[StepMetrics], None]
    ) -> None:
        """`monitor` checks each step's numbers; `report` gets them, except those of skipped steps."""
        self._processes = processes
        self._monitor = monitor
        self._report = report
        self._steps: list[Step] = []
        self._capacity = 1 if processes.device.type == "cpu" else SYNC_EVERY

    @property
    def pending(self) -> bool:
        """Whether there are numbers that have not been read."""
        return bool(self._steps)

    def add(self, step: Step) -> None:
        """Take a finished step, and read the numbers of all when there are enough.

        Raises TrainingDiverged when a loss or gradient is not finite and the run is to stop.
        """
        self._steps.append(step)
        if len(self._steps) >= self._capacity:
            self.read()

    def read(self) -> None:
        """Read and report all pending numbers; every process must call this after the same step."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        losses = self._processes.all_reduce_sum(torch.stack([step.loss for step in steps]))
        norms = torch.stack([step.gradient_norm for step in steps])
        values = [value.float().view(1) for step in steps for value in step.values.values()]
        numbers = torch.cat([losses, norms, *values]).tolist()
        count, others = len(steps), iter(numbers[2 * len(steps) :])
        for step, loss, norm in zip(steps, numbers[:count], numbers[count : 2 * count], strict=True):
            measured = {name: next(others) for name in step.values}
            if self._monitor.check(step, loss, norm):
                self._report(
                    StepMetrics(
                        step=step.number,
                        epoch=step.plan.epoch,
                        loss=loss,
                        gradient_norm=norm,
                        learning_rates=step.learning_rates,
                        values=measured,
                    )
                )
