"""The optimizer `prodigy`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import OptimizerConfig, hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.api import ParameterGroup


@frozen(kw_only=True)
class ProdigyConfig(OptimizerConfig):
    """Prodigy: Adam that finds the learning rate itself (Mishchenko and Defazio, 2023, arXiv:2306.06101)."""

    name = "prodigy"
    finds_learning_rate = True
    usual_lr = 1.0
    requires = ("prodigyopt",)
    supports_group_lrs = False

    lr: float = field(default=1.0, validator=v.ge(0))
    """Factor of the learning rate that is found; leave it at 1."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    beta3: float | None = field(default=None, validator=v.optional([v.ge(0), v.lt(1)]))
    """Decay of the running averages that the estimate is made from; the root of the second of `betas` when absent."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update, so that it never is zero."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Strength of the weight decay."""
    decouple: bool = True
    """Take the weight decay from the weights, as AdamW does, rather than add it to the gradient, as Adam does."""
    use_bias_correction: bool = False
    """Make up for averages that begin at zero, as Adam does."""
    safeguard_warmup: bool = False
    """Keep a warm-up of the LR schedule from making the estimate too high."""
    d0: float = field(default=1e-6, validator=v.gt(0))
    """First estimate of the distance to the solution."""
    d_coef: float = field(default=1.0, validator=v.gt(0))
    """Factor of the estimate; 0.5 and 2 are usual, and better than another `lr`."""
    growth_rate: float | None = field(default=None, validator=v.optional(v.gt(1)))
    """Factor by which the estimate may grow at a step, unlimited when absent; 1.02 acts like a warm-up."""
    slice_p: int = field(default=1, validator=v.ge(1))
    """Make the estimate from every so many-th weight only, which saves memory; 11 is usual."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The one of prodigyopt, at rest while the LR schedule is at zero."""
        from prodigyopt import Prodigy

        from lorakit.api import skip_at_zero_lr, torch_groups

        settings = self.extra_options() | {"growth_rate": self.growth_rate or math.inf}
        # As options of each group, because the constructor prints some of them.
        own_groups = [{**group, **settings} for group in torch_groups(groups)]
        optimizer: Optimizer = skip_at_zero_lr(Prodigy)(own_groups, d0=self.d0)
        return optimizer


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """Prodigy."""
    return [ProdigyConfig]
