"""The optimizer `lion`."""

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
class LionConfig(OptimizerConfig):
    """Lion: the sign of an interpolated momentum (Chen et al., 2023, arXiv:2302.06675).

    Needs a learning rate three to ten times lower than AdamW's.
    """

    name = "lion"
    usual_lr = 3e-5
    requires = ("lion-pytorch",)

    betas: tuple[float, float] = field(default=(0.9, 0.99), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the update direction and of the momentum."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`lion_pytorch.Lion`."""
        from lion_pytorch import Lion

        from lorakit.api import torch_groups

        optimizer: Optimizer = Lion(torch_groups(groups), betas=self.betas, weight_decay=self.weight_decay)
        return optimizer


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """Lion."""
    return [LionConfig]
