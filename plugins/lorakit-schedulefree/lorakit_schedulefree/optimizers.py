"""The optimizers `adamw_schedulefree`, `radam_schedulefree` and `sgd_schedulefree`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import OptimizerConfig, Problem, check_warmup, hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.api import ParameterGroup


@frozen(kw_only=True)
class ScheduleFreeConfig(OptimizerConfig):
    """An optimizer of schedulefree; a subclass gives the class's name and has its options as fields."""

    requires = ("schedulefree",)
    schedule_free = True
    class_name: ClassVar[str]
    """Its name in `schedulefree`."""

    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""
    r: float = field(default=0.0, validator=v.ge(0))
    """Weight of a step in the average: step^r."""
    weight_lr_power: float = field(default=2.0, validator=v.ge(0))
    """Weight of a step of the warm-up in the average: its learning rate to this power."""

    def warnings_of_length(self, total_steps: int) -> Iterator[Problem]:
        """A warning if the warm-up is as long as the run."""
        yield from check_warmup("warmup_steps", getattr(self, "warmup_steps", 0), total_steps)

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The class of schedulefree."""
        import schedulefree

        from lorakit.api import torch_groups

        optimizer: Optimizer = getattr(schedulefree, self.class_name)(torch_groups(groups), **self.extra_options())
        return optimizer


@frozen(kw_only=True)
class AdamWScheduleFreeConfig(ScheduleFreeConfig):
    """AdamW without a schedule, which saves averaged weights instead (Defazio et al., 2024, arXiv:2405.15682)."""

    name = "adamw_schedulefree"
    usual_lr = 3e-4
    class_name = "AdamWScheduleFree"

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.gt(0), v.lt(1)]))
    """Interpolation between iterate and average for the gradient, and decay of the average of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""
    warmup_steps: int = field(default=0, validator=v.ge(0))
    """Length of the linear warm-up in steps."""


@frozen(kw_only=True)
class RAdamScheduleFreeConfig(ScheduleFreeConfig):
    """RAdam without a schedule, which needs no warm-up either (arXiv:1908.03265, arXiv:2405.15682)."""

    name = "radam_schedulefree"
    usual_lr = 3e-4
    class_name = "RAdamScheduleFree"

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.gt(0), v.lt(1)]))
    """Interpolation between iterate and average for the gradient, and decay of the average of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""
    silent_sgd_phase: bool = True
    """Take no steps while the variance of the adaptive learning rate is too high; otherwise, steps of SGD."""


@frozen(kw_only=True)
class SGDScheduleFreeConfig(ScheduleFreeConfig):
    """Stochastic gradient descent without a schedule (arXiv:2405.15682)."""

    name = "sgd_schedulefree"
    usual_lr = 1.0
    class_name = "SGDScheduleFree"

    momentum: float = field(default=0.9, validator=[v.gt(0), v.lt(1)])
    """Interpolation between iterate and average for the gradient."""
    warmup_steps: int = field(default=0, validator=v.ge(0))
    """Length of the linear warm-up in steps."""


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """All of schedulefree."""
    return [AdamWScheduleFreeConfig, RAdamScheduleFreeConfig, SGDScheduleFreeConfig]
