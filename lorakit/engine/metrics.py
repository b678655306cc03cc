"""Loss and gradient norm of each step, kept on the device and read some steps at a time.

Reading a number makes the host wait for the device, so on an accelerator the numbers of several
steps are read at once. That is also when a loss that is not finite is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from lorakit.engine.observing import StepMetrics
from lorakit.engine.processes import Processes
from lorakit.errors import TrainingDiverged

STEPS_PER_READING = 10


def effective_rate(group: Mapping[str, Any]) -> float:
    """The learning rate that the last step was taken with, as an optimizer's parameter group tells it.

    Optimizers that find it themselves keep a factor under `d`; schedule-free ones, the rate under `scheduled_lr`.
    """
    factor = group.get("d", 1.0)
    # A tensor would have to be waited for.
    return float(group.get("scheduled_lr", group["lr"])) * (factor if isinstance(factor, float) else 1.0)


@frozen
class PendingStep:
    """A finished step whose numbers have not been read."""

    step: int
    epoch: int
    images: tuple[str, ...]
    learning_rates: Mapping[str, float]
    loss: Tensor
    gradient_norm: Tensor
    values: Mapping[str, Tensor] = field(factory=dict)
    """What else was measured, the same on all processes: scalars on the device."""


class MetricsReader:
    """Collects the numbers of steps and reads them together."""

    def __init__(self, processes: Processes, scaled: bool, report: Callable[[StepMetrics], None]) -> None:
        """`scaled` says that a loss scaler handles gradients that overflow; `report` gets each step's numbers."""
        self._processes = processes
        self._scaled = scaled
        self._report = report
        self._pending: list[PendingStep] = []
        self._capacity = 1 if processes.device.type == "cpu" else STEPS_PER_READING

    @property
    def waiting(self) -> bool:
        """Whether there are numbers that have not been read."""
        return bool(self._pending)

    def add(self, step: PendingStep) -> None:
        """Take a step's numbers, and read all when enough have come together.

        Raises TrainingDiverged when a loss or gradient is not finite.
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
            self._refuse_divergence(pending, loss, norm)
            self._report(
                StepMetrics(
                    step=pending.step,
                    epoch=pending.epoch,
                    loss=loss,
                    gradient_norm=norm,
                    learning_rates=pending.learning_rates,
                    values={name: next(values) for name in pending.values},
                )
            )

    def _refuse_divergence(self, pending: PendingStep, loss: float, norm: float) -> None:
        if math.isfinite(loss) and (self._scaled or math.isfinite(norm)):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {norm}"
        names = ", ".join(pending.images[:8]) + (" …" if len(pending.images) > 8 else "")
        raise TrainingDiverged(
            f"step {pending.step}: {what}, so training was stopped. Images of this step: {names}. "
            "Saves made before are kept. Lower optimizer.lr, or use training.mixed_precision "
            '"bf16" or "no" instead of "fp16"; if it is always the same image, look at that file.'
        )
