"""The optimizer `radam`."""

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
class RAdamConfig(OptimizerConfig):
    """RAdam: Adam that needs no learning-rate warm-up (Liu et al., 2020, arXiv:1908.03265)."""

    name = "radam"

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`torch.optim.RAdam`, with the weight decay of AdamW."""
        from torch.optim import RAdam

        from lorakit.api import torch_groups

        return RAdam(
            torch_groups(groups), betas=self.betas, weight_decay=self.weight_decay, decoupled_weight_decay=True
        )


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """RAdam."""
    return [RAdamConfig]
