"""Steps whose loss or gradients are NaN or infinite: they stop the run, or are logged and change nothing.

The device itself decides at once what becomes of such a step; the host notices it when the step's
numbers are read, some steps later.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorakit.errors import TrainingDiverged
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.schedule import Step
from lorakit.training.step.gradients import FlatGradients

log = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 20
"""This many skipped steps in a row stop the run."""
OVERFLOWS_IN_A_ROW = 50
"""This many steps that the loss scaler skips do, too: by then the loss scale is too low to be the cause."""
NAMES_SHOWN = 8
"""How many images a message names."""


class StepGuard:
    """Takes the optimizer's steps; where steps may be skipped, one that is not finite changes nothing.

    Fused optimizers read that on the device; for others the host waits for the device.
    """

    def __init__(
        self, optimizer: Optimizer, scaler: torch.amp.GradScaler, processes: Distributed, *, skips: bool
    ) -> None:
        """`scaler`, where it is enabled, skips steps itself when gradients overflow."""
        self._optimizer = optimizer
        self._scaler = scaler
        self._processes = processes
        self._skips = skips
        self._loss = torch.zeros((), device=processes.device)

    def mark(self, gradients: FlatGradients, loss: Tensor) -> None:
        """Make a loss that is not finite, on whichever process, visible in the gradients."""
        if self._skips:
            self._loss = self._processes.all_reduce_sum(loss.detach().clone())
            gradients.poison_if_nonfinite(self._loss)

    def step(self, norm: Tensor) -> None:
        """Move the parameters; `norm` is that of all gradients."""
        optimizer: Any = self._optimizer
        if self._scaler.is_enabled():
            before = self._scale()
            self._scaler.step(optimizer)
            self._scaler.update()
            if self._skips:
                # Where the loss itself is not finite, scaling it lower fixes nothing, and would at last lose gradients.
                self._scaler.update(torch.where(self._loss.isfinite(), self._scale(), before))
        elif self._skips and getattr(optimizer, "_step_supports_amp_scaling", False):
            # The protocol of torch.amp.GradScaler.
            optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not self._skips or norm.isfinite().item():
            optimizer.step()

    def _scale(self) -> Tensor:
        """The scaler's factor, on the device."""
        scale: Tensor = self._scaler.scale(torch.ones_like(self._loss))
        return scale


class DivergenceMonitor:
    """Checks the numbers of steps, in order."""

    def __init__(self, groups: Sequence[str], skips: bool, scaled: bool, is_main: bool) -> None:
        """`groups` are the names of the parameter groups; `scaled` says that a loss scaler handles overflow."""
        self._groups = groups
        self._skips = skips
        self._scaled = scaled
        self._is_main = is_main
        self._in_a_row = 0

    def check(self, step: Step, loss: float, norm: float) -> bool:
        """Whether a step has numbers to report; a skipped one has none, and is logged.

        `loss` and `norm` are those of all processes together. Raises TrainingDiverged where the run is to stop.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        overflows = self._scaled and math.isfinite(loss)
        limit = OVERFLOWS_IN_A_ROW if overflows else SKIPS_IN_A_ROW if self._skips else 1
        if self._in_a_row >= limit:
            raise TrainingDiverged(self._message(step, loss, norm))
        images = self._images(step, loss)
        if not overflows and (self._is_main or images):
            log.warning("step %d is skipped: %s. %s", step.number, self._what(step, loss, norm), images or _ELSEWHERE)
        return overflows

    def _message(self, step: Step, loss: float, norm: float) -> str:
        others = f", as in the {self._in_a_row - 1} steps before" if self._in_a_row > 1 else ""
        skip = "" if self._skips else ', or set training.on_nonfinite = "skip"'
        return (
            f"step {step.number}: {self._what(step, loss, norm)}{others}, so training was stopped. "
            f"{self._images(step, loss) or _ELSEWHERE} "
            "Saves made before are kept. Lower optimizer.lr, or use training.mixed_precision "
            f'"bf16" or "no" instead of "fp16"; if it is always the same image, look at that file{skip}.'
        )

    def _what(self, step: Step, loss: float, norm: float) -> str:
        """The part that is not finite."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        found = zip(self._groups, step.group_norms.tolist(), strict=True)
        groups = [name for name, group_norm in found if not math.isfinite(group_norm)]
        return f"the gradient of {' and '.join(groups) or 'all parts together'} is {norm}"

    def _images(self, step: Step, loss: float) -> str:
        """The images of the first micro-batch whose loss is not finite, or of all where only gradients are not.

        Empty where the cause is on another process.
        """
        so_far = zip(step.images, step.losses, strict=True)
        faulty = next((list(names) for names, loss in so_far if not loss.isfinite().item()), [])
        names = faulty or [name for names in step.images for name in names if math.isfinite(loss) and self._is_main]
        shown = ", ".join(names[:NAMES_SHOWN]) + (" …" if len(names) > NAMES_SHOWN else "")
        return f"Images of this step: {shown}." if shown else ""


_ELSEWHERE = "Its images are named in the log of another process."
