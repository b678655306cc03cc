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
    """An optimizer of the package schedulefree; a subclass names the class and has its options as fields."""

    requires = ("schedulefree",)
    schedule_free = True
    class_name: ClassVar[str]
    """What it is called in `schedulefree`."""

    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Share of each weight, times the learning rate, that it loses at each step."""
    r: float = field(default=0.0, validator=v.ge(0))
    """Weight of later steps in the average: step^r."""
    weight_lr_power: float = field(default=2.0, validator=v.ge(0))
    """Weight of steps of the warm-up in the average: their learning rate to this power."""

    def warnings_of_length(self, total_steps: int) -> Iterator[Problem]:
        """Says so if the warm-up is as long as the run."""
        yield from check_warmup("warmup_steps", getattr(self, "warmup_steps", 0), total_steps)

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The one of the package schedulefree."""
        import schedulefree

        from lorakit.api import torch_groups

        optimizer: Optimizer = getattr(schedulefree, self.class_name)(torch_groups(groups), **self.extra_options())
        return optimizer


@frozen(kw_only=True)
class AdamWScheduleFreeConfig(ScheduleFreeConfig):
    """AdamW without a schedule: it saves an average of the weights instead (Defazio et al., 2024, arXiv:2405.15682)."""

    name = "adamw_schedulefree"
    usual_lr = 3e-4
    class_name = "AdamWScheduleFree"

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.gt(0), v.lt(1)]))
    """How near to the average the gradient is taken, and decay of the running average of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update, so that it never is zero."""
    warmup_steps: int = field(default=0, validator=v.ge(0))
    """Steps over which the learning rate rises from zero."""


@frozen(kw_only=True)
class RAdamScheduleFreeConfig(ScheduleFreeConfig):
    """RAdam without a schedule, which needs no warm-up either (arXiv:1908.03265, arXiv:2405.15682)."""

    name = "radam_schedulefree"
    usual_lr = 3e-4
    class_name = "RAdamScheduleFree"

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.gt(0), v.lt(1)]))
    """How near to the average the gradient is taken, and decay of the running average of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update, so that it never is zero."""
    silent_sgd_phase: bool = True
    """Take no steps as long as the average of squared gradients says too little; else steps of gradient descent."""


@frozen(kw_only=True)
class SGDScheduleFreeConfig(ScheduleFreeConfig):
    """Gradient descent without a schedule (arXiv:2405.15682)."""

    name = "sgd_schedulefree"
    class_name = "SGDScheduleFree"

    momentum: float = field(default=0.9, validator=[v.gt(0), v.lt(1)])
    """How near to the average the gradient is taken."""
    warmup_steps: int = field(default=0, validator=v.ge(0))
    """Steps over which the learning rate rises from zero."""


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """All of the package schedulefree."""
    return [AdamWScheduleFreeConfig, RAdamScheduleFreeConfig, SGDScheduleFreeConfig]
