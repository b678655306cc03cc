"""Steps of bitsandbytes' optimizers that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def without_waits(kind: Any) -> Any:
    """The same optimizer; `kind`'s steps wait for the device after each parameter, which only paging needs."""

    class WithoutWaits(kind):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """Take a step."""
            if self.is_paged or not self.initialized:
                return super().step(closure)  # type: ignore[no-any-return]
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_index, index)
                    self.update_step(group, parameter, group_index, index)
            return loss

    return WithoutWaits
