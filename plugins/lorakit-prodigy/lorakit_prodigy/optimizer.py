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
    """Factor of the estimated learning rate; leave it at 1."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    beta3: float | None = field(default=None, validator=v.optional([v.ge(0), v.lt(1)]))
    """Decay of the running averages for the estimate; the square root of the second of `betas` when absent."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Strength of the weight decay."""
    decouple: bool = True
    """Use decoupled weight decay, as in AdamW, instead of an L2 penalty, as in Adam."""
    use_bias_correction: bool = False
    """Correct the bias of averages that start at zero, as in Adam."""
    safeguard_warmup: bool = False
    """Prevent a warm-up of the LR schedule from raising the estimate too far."""
    d0: float = field(default=1e-6, validator=v.gt(0))
    """Initial estimate of the distance to the solution."""
    d_coef: float = field(default=1.0, validator=v.gt(0))
    """Factor of the estimate; 0.5 and 2 are usual. Change this rather than `lr`."""
    growth_rate: float | None = field(default=None, validator=v.optional(v.gt(1)))
    """Limit of the factor by which the estimate grows in a step, none when absent; 1.02 acts like a warm-up."""
    slice_p: int = field(default=1, validator=v.ge(1))
    """Estimate from every n-th weight only, which saves memory; 11 is usual."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`prodigyopt.Prodigy`; it takes no step while the LR schedule is at zero."""
        from prodigyopt import Prodigy

        from lorakit.api import skip_at_zero_lr, torch_groups

        settings = self.extra_options() | {"growth_rate": self.growth_rate or math.inf}
        # Options of the groups, because the constructor prints some of its arguments.
        with_settings = [{**group, **settings} for group in torch_groups(groups)]
        optimizer: Optimizer = skip_at_zero_lr(Prodigy)(with_settings, d0=self.d0)
        return optimizer


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """Prodigy."""
    return [ProdigyConfig]
