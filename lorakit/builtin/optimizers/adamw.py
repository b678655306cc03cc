"""The optimizer `adamw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import OptimizerConfig, hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.api import ParameterGroup


@frozen(kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

    name = "adamw"
    usual_lr = 1e-4

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""
    weight_decay: float = field(default=0.01, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`torch.optim.AdamW`, fused where the device has a fused kernel."""
        from torch.optim import AdamW

        from lorakit.api import torch_groups
        from lorakit.builtin.optimizers._fused_adamw import FusedAdamW

        is_fused = all(p.device.type in {"cpu", "cuda"} for group in groups for p in group.parameters)
        kind = FusedAdamW if is_fused else AdamW
        return kind(torch_groups(groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """AdamW."""
    return [AdamWConfig]
