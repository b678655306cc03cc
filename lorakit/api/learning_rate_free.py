"""Learning-rate-free optimizers, D-Adaptation and Prodigy, made to work with warm-ups.

They estimate one distance to the solution from all parameters. Their implementations fail, or keep
updating, when a schedule sets the learning rate to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def skip_at_zero_lr(cls: type[Any]) -> type[Any]:
    """A subclass that skips steps while all learning rates are 0, and groups whose learning rate is 0.

    The estimate in each group, `d`, becomes a float, which logs can read without waiting for the device.
    """

    class SkipsZeroLR(cls):  # type: ignore[misc]
        param_groups: list[dict[str, Any]]

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            all_groups = self.param_groups
            self.param_groups = [group for group in all_groups if group["lr"] > 0]
            try:
                loss: float | None = super().step(closure) if self.param_groups else None
                for group in self.param_groups:
                    group["d"] = float(group["d"])
            finally:
                self.param_groups = all_groups
            return loss

    return SkipsZeroLR
