"""What optimizers that find their learning rate themselves need, to be used with warm-ups.

Those of the D-Adaptation family estimate one distance to the solution from all parameters. Their
implementations fail, or go on moving, when a schedule sets the learning rate to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def skip_at_zero_lr(cls: type[Any]) -> type[Any]:
    """A subclass that takes no step while all learning rates are 0, and leaves out groups whose own is 0.

    The estimate in each group, `d`, is a plain number, which logs can read without waiting for the device.
    """

    class Resting(cls):  # type: ignore[misc]
        param_groups: list[dict[str, Any]]

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            everything = self.param_groups
            self.param_groups = [group for group in everything if group["lr"] > 0]
            try:
                loss: float | None = super().step(closure) if self.param_groups else None
                for group in self.param_groups:
                    group["d"] = float(group["d"])
            finally:
                self.param_groups = everything
            return loss

    return Resting
