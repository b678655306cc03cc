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
from lorakit.training.step.nan_guard import DivergenceMonitor, StepRecord

SYNC_EVERY = 10


def effective_lr(group: Mapping[str, Any]) -> float:
    """The learning rate that the last step was taken with, as an optimizer's parameter group tells it.

    Optimizers that find it themselves keep a factor under `d`; schedule-free ones, the rate under `scheduled_lr`.
    """
    factor = group.get("d", 1.0)
    # A tensor would have to be waited for.
    return float(group.get("scheduled_lr", group["lr"])) * (factor if isinstance(factor, float) else 1.0)


class AsyncMetrics:
    """Collects the numbers of steps and reads them together."""

    def __init__(self, processes: Distributed, judge: DivergenceMonitor, report: Callable[[StepMetrics], None]) -> None:
        """`judge` looks at each step's numbers; `report` gets them, but for steps that were skipped."""
        self._processes = processes
        self._judge = judge
        self._report = report
        self._pending: list[StepRecord] = []
        self._capacity = 1 if processes.device.type == "cpu" else SYNC_EVERY

    @property
    def waiting(self) -> bool:
        """Whether there are numbers that have not been read."""
        return bool(self._pending)

    def add(self, step: StepRecord) -> None:
        """Take a step's numbers, and read all when enough have come together.

        Raises TrainingDiverged when a loss or gradient is not finite and the run is to stop.
        """
        self._pending.append(step)
        if len(self._pending) >= self._capacity:
            self.read()

    def read(self) -> None:
        """Read and report all numbers that wait; every process must call this after the same step."""
        if not self._pending:
            return
        losses = self._processes.sum(torch.stack([pending.loss for pending in self._pending]))
        norms = torch.stack([pending.gradient_norm for pending in self._pending])
        others = [value.float().view(1) for pending in self._pending for value in pending.values.values()]
        numbers = torch.cat([losses, norms, *others]).tolist()
        pending_steps, self._pending = self._pending, []
        count = len(pending_steps)
        values = iter(numbers[2 * count :])
        for pending, loss, norm in zip(pending_steps, numbers[:count], numbers[count : 2 * count], strict=True):
            measured = {name: next(values) for name in pending.values}
            if self._judge.counts(pending, loss, norm):
                self._report(
                    StepMetrics(
                        step=pending.step,
                        epoch=pending.epoch,
                        loss=loss,
                        gradient_norm=norm,
                        learning_rates=pending.learning_rates,
                        values=measured,
                    )
                )
