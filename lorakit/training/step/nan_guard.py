"""Steps whose loss or gradients are NaN or infinite: they are told of, and stop the run or change nothing.

What becomes of such a step is decided on the device, at once; that there was one is noticed when its
numbers are read, some steps later.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from attrs import field, frozen
from torch import Tensor
from torch.optim import Optimizer

from lorakit.errors import TrainingDiverged
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.step.gradients import FlatGradients

log = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 20
"""So many steps that are skipped one after another stop the run."""
OVERFLOWS_IN_A_ROW = 50
"""So many that the loss scaler skips do, too: by then the loss is scaled so low that it cannot be at fault."""
NAMES_SHOWN = 8
"""Images that a message names."""


@frozen(kw_only=True)
class StepRecord:
    """A finished step whose numbers have not been read: scalars on the device, but for names."""

    step: int
    epoch: int
    images: tuple[tuple[str, ...], ...]
    """Names of the images of each of this process's micro-batches."""
    learning_rates: Mapping[str, float]
    loss: Tensor
    """This process's part of the mean."""
    losses: tuple[Tensor, ...]
    """What it had come to after each of its micro-batches."""
    gradient_norm: Tensor
    group_norms: Tensor
    """The norm of each parameter group's gradients, [G]."""
    values: Mapping[str, Tensor] = field(factory=dict)
    """What else was measured, the same on all processes."""


class StepGuard:
    """Takes the optimizer's steps; where steps are to be skipped, one that is not finite leaves all as it was.

    An optimizer that can be told so on the device, as fused ones can, is; for any other the device is waited for.
    """

    def __init__(
        self, optimizer: Optimizer, scaler: torch.amp.GradScaler, processes: Distributed, *, skips: bool
    ) -> None:
        """`scaler`, where it is enabled, skips steps of its own accord when gradients overflow."""
        self._optimizer = optimizer
        self._scaler = scaler
        self._processes = processes
        self._skips = skips
        self._loss = torch.zeros((), device=processes.device)

    def mark(self, gradients: FlatGradients, loss: Tensor) -> None:
        """See to it that a loss that is not finite, be it another process's, shows in the gradients."""
        if self._skips:
            self._loss = self._processes.sum(loss.detach().clone())
            gradients.poison_if_nonfinite(self._loss)

    def step(self, norm: Tensor) -> None:
        """Move the parameters; `norm` is that of all gradients."""
        if self._scaler.is_enabled():
            self._scaled_step()
        elif self._skips:
            _step_if_finite(self._optimizer, norm)
        else:
            self._optimizer.step()

    def _scaled_step(self) -> None:
        before = self._scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._skips:
            # Where the loss itself is not finite, scaling it lower mends nothing, and would in the end lose gradients.
            self._scaler.update(torch.where(self._loss.isfinite(), self._scale(), before))

    def _scale(self) -> Tensor:
        """The scaler's factor, on the device."""
        scale: Tensor = self._scaler.scale(torch.ones_like(self._loss))
        return scale


def _step_if_finite(optimizer: Optimizer, norm: Tensor) -> None:
    # The protocol of torch.amp.GradScaler.
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif norm.isfinite().item():
        optimizer.step()


class DivergenceMonitor:
    """Judges steps by their numbers, in order."""

    def __init__(self, groups: Sequence[str], skips: bool, scaled: bool, is_main: bool) -> None:
        """`groups` are the names of the parameter groups; `scaled` says that a loss scaler handles overflow."""
        self._groups = groups
        self._skips = skips
        self._scaled = scaled
        self._is_main = is_main
        self._in_a_row = 0

    def counts(self, step: StepRecord, loss: float, norm: float) -> bool:
        """Whether a step has numbers to report; one that was skipped has none, and is told of.

        `loss` and `norm` are the sums over all processes. Raises TrainingDiverged where the run is to stop.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        overflows = self._scaled and math.isfinite(loss)
        limit = OVERFLOWS_IN_A_ROW if overflows else SKIPS_IN_A_ROW if self._skips else 1
        if self._in_a_row >= limit:
            raise TrainingDiverged(self._verdict(step, loss, norm))
        images = self._images(step, loss)
        if not overflows and (self._is_main or images):
            log.warning("step %d is skipped: %s. %s", step.step, self._what(step, loss, norm), images or _ELSEWHERE)
        return overflows

    def _verdict(self, step: StepRecord, loss: float, norm: float) -> str:
        others = f", as in the {self._in_a_row - 1} steps before" if self._in_a_row > 1 else ""
        skip = "" if self._skips else ', or set training.on_nonfinite = "skip"'
        return (
            f"step {step.step}: {self._what(step, loss, norm)}{others}, so training was stopped. "
            f"{self._images(step, loss) or _ELSEWHERE} "
            "Saves made before are kept. Lower optimizer.lr, or use training.mixed_precision "
            f'"bf16" or "no" instead of "fp16"; if it is always the same image, look at that file{skip}.'
        )

    def _what(self, step: StepRecord, loss: float, norm: float) -> str:
        """The part that is not finite."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        found = zip(self._groups, step.group_norms.tolist(), strict=True)
        groups = [name for name, own in found if not math.isfinite(own)]
        return f"the gradient of {' and '.join(groups) or 'all parts together'} is {norm}"

    def _images(self, step: StepRecord, loss: float) -> str:
        """The images of the first micro-batch whose loss is not finite, or of all where only gradients are not.

        Empty where the fault is another process's.
        """
        so_far = zip(step.images, step.losses, strict=True)
        guilty = next((list(names) for names, loss in so_far if not loss.isfinite().item()), [])
        names = guilty or [name for own in step.images for name in own if math.isfinite(loss) and self._is_main]
        shown = ", ".join(names[:NAMES_SHOWN]) + (" …" if len(names) > NAMES_SHOWN else "")
        return f"Images of this step: {shown}." if shown else ""


_ELSEWHERE = "Its images are named by another process."
