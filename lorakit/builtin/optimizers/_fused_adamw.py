"""PyTorch's fused AdamW without the modules that it loads at the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


class FusedAdamW(AdamW):
    """`torch.optim.AdamW` with `fused=True`, bit for bit, for parameters on one device.

    PyTorch's methods import its compiler, which takes seconds and is only needed for compiled optimizers.
    """

    grad_scale: Tensor | None
    """Set by a loss scaler: the factor of the gradients, unless they have been unscaled since."""
    found_inf: Tensor | None
    """Set by a loss scaler: 1 if a gradient has overflowed and the step should change nothing."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        """Groups and settings of `torch.optim.AdamW`."""
        super().__init__(groups, fused=True, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does."""
        Optimizer.add_param_group.__wrapped__(self, param_group)  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients; returns the result of the closure, if there is one."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        # A loss scaler sets these attributes before the step and removes them after it.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            columns: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *columns)  # type: ignore[no-untyped-call]
            if not columns[0]:
                continue
            steps = columns[-1]
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                *columns,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=grad_scale,
                found_inf=found_inf,
            )
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))
        return result
