"""The optimizer `dadaptation`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit import hookimpl
from lorakit.components import OptimizerConfig
from lorakit.errors import Problem

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.networks.network import ParameterGroup


@frozen(kw_only=True)
class DAdaptationConfig(OptimizerConfig):
    """D-Adaptation: Adam that finds the learning rate itself (Defazio and Mishchenko, 2023, arXiv:2301.07733).

    The variant of the paper's preprint, which is also what sd-scripts means by `DAdaptation`.
    """

    name = "dadaptation"
    own_learning_rates = False
    requires = ("dadaptation",)

    lr: float = field(default=1.0, validator=v.ge(0))
    """Factor of the learning rate that is found; leave it at 1."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update, so that it never is zero."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Strength of the weight decay."""
    decouple: bool = False
    """Take the weight decay from the weights, as AdamW does, rather than add it to the gradient, as Adam does."""
    d0: float = field(default=1e-6, validator=v.gt(0))
    """First estimate of the distance to the solution; it only ever grows."""
    growth_rate: float | None = field(default=None, validator=v.optional(v.gt(1)))
    """Factor by which the estimate may grow at a step, unlimited when absent; 1.02 acts like a warm-up."""

    def problems(self) -> Iterator[Problem]:
        """Says so if the parts' learning rates differ: it can adapt only one."""
        rates = {f"{part}_lr": set(self.lrs_of(part)) - {0} for part in ("unet", "text_encoder")}
        if len(set().union(*rates.values())) > 1:
            for key, own in rates.items():
                for rate in own - {self.lr}:
                    hint = f"Leave it out, or set {key} = 0 to leave this part out"
                    yield Problem(key, f"must be lr, {self.lr:g}, with dadaptation, not {rate:g}", hint)

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The one of the package dadaptation."""
        from dadaptation.experimental.dadapt_adam_preprint import DAdaptAdamPreprint

        from lorakit.networks.network import torch_groups

        optimizer: Optimizer = DAdaptAdamPreprint(
            [{**group, "decouple": self.decouple} for group in torch_groups(groups)],
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            d0=self.d0,
            growth_rate=self.growth_rate or math.inf,
        )
        return optimizer


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """D-Adaptation."""
    return [DAdaptationConfig]
