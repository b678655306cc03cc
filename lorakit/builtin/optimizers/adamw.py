"""The optimizer `adamw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import OptimizerConfig
from lorakit.api.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.networks.network import ParameterGroup


@frozen(kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW: Adam with weight decay of its own (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

    name = "adamw"
    usual_lr = 1e-4

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update, so that it never is zero."""
    weight_decay: float = field(default=0.01, validator=v.ge(0))
    """Share of each weight, times the learning rate, that it loses at each step."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """PyTorch's, as one kernel for all parameters where the device has it."""
        from torch.optim import AdamW

        from lorakit.builtin.optimizers._fused_adamw import FusedAdamW
        from lorakit.networks.network import torch_groups

        is_fused = all(p.device.type in {"cpu", "cuda"} for group in groups for p in group.parameters)
        kind = FusedAdamW if is_fused else AdamW
        return kind(torch_groups(groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """AdamW."""
    return [AdamWConfig]
