"""The optimizers of D-Adaptation, which find the learning rate themselves.

They estimate one distance to the solution, `d`, for all parameters; the effective learning rate is d · `lr`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import OptimizerConfig, hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.api import ParameterGroup


_SLOW_GROWTH = {"growth_rate": 1.02}
"""Without it the estimates of Adam and Adan can grow so large in the first steps that a LoRA never recovers."""


@frozen(kw_only=True)
class DAdaptConfig(OptimizerConfig):
    """An optimizer of dadaptation; a subclass gives the class's name and has its options as fields."""

    requires = ("dadaptation",)
    supports_group_lrs = False
    finds_learning_rate = True
    usual_lr = 1.0
    module: ClassVar[str] = "dadaptation"
    """The module of the class."""
    class_name: ClassVar[str]
    """Its name there."""

    lr: float = field(default=1.0, validator=v.ge(0))
    """Factor of the estimated learning rate; leave it at 1."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Weight decay."""
    d0: float = field(default=1e-6, validator=v.gt(0))
    """Initial estimate of the distance to the solution; the estimate only grows."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The class of dadaptation; it takes no step while the LR schedule is at zero."""
        from lorakit.api import skip_at_zero_lr, torch_groups

        cls = skip_at_zero_lr(self.repaired(getattr(import_module(self.module), self.class_name)))
        settings = {key: math.inf if value is None else value for key, value in self.extra_options().items()}
        d0 = settings.pop("d0")
        # Options of the groups, because the constructors print some of their arguments.
        optimizer: Optimizer = cls([{**group, **settings} for group in torch_groups(groups)], d0=d0)
        return optimizer

    def repaired(self, cls: type[Any]) -> type[Any]:
        """The class, or a subclass that works around a fault."""
        return cls


@frozen(kw_only=True)
class _GrowingConfig(DAdaptConfig):
    """The options of those whose estimate's growth can be limited."""

    growth_rate: float | None = field(default=None, validator=v.optional(v.gt(1)))
    """Limit of the factor by which the estimate grows in a step, none when absent; 1.02 acts like a warm-up."""


@frozen(kw_only=True)
class DAdaptationConfig(_GrowingConfig):
    """D-Adaptation: Adam that finds its learning rate (Defazio and Mishchenko, 2023, arXiv:2301.07733).

    The variant of the preprint, which is also what sd-scripts means by `DAdaptation`.
    """

    name = "dadaptation"
    module = "dadaptation.experimental.dadapt_adam_preprint"
    class_name = "DAdaptAdamPreprint"
    usual_options = _SLOW_GROWTH

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""
    decouple: bool = False
    """Use decoupled weight decay, as in AdamW, instead of an L2 penalty, as in Adam."""


@frozen(kw_only=True)
class DAdaptAdamConfig(DAdaptationConfig):
    """D-Adaptation of Adam, in the variant of the published paper (arXiv:2301.07733)."""

    name = "dadaptadam"
    module = "dadaptation"
    class_name = "DAdaptAdam"

    use_bias_correction: bool = False
    """Correct the bias of averages that start at zero, as in Adam."""


@frozen(kw_only=True)
class DAdaptAdanConfig(_GrowingConfig):
    """D-Adaptation of Adan, which also averages the change of the gradient (Xie et al., 2022, arXiv:2208.06677)."""

    name = "dadaptadan"
    class_name = "DAdaptAdan"
    usual_options = _SLOW_GROWTH

    betas: tuple[float, float, float] = field(default=(0.98, 0.92, 0.99), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient, of its change, and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""
    weight_decay: float = field(default=0.02, validator=v.ge(0))
    """Weight decay."""
    no_prox: bool = False
    """Apply the weight decay before the step, as in AdamW, instead of after it."""


@frozen(kw_only=True)
class DAdaptAdanIPConfig(DAdaptAdanConfig):
    """D-Adaptation of Adan, with the estimate by inner products; its authors call it experimental."""

    name = "dadaptadanip"
    module = "dadaptation.experimental.dadapt_adan_ip"
    class_name = "DAdaptAdanIP"


@frozen(kw_only=True)
class DAdaptLionConfig(DAdaptConfig):
    """D-Adaptation of Lion, the sign of an interpolated momentum; its authors call it experimental."""

    name = "dadaptlion"
    class_name = "DAdaptLion"

    betas: tuple[float, float] = field(default=(0.9, 0.99), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the update direction and of the momentum."""


@frozen(kw_only=True)
class DAdaptAdaGradConfig(_GrowingConfig):
    """D-Adaptation of AdaGrad, whose steps only shrink (arXiv:2301.07733)."""

    name = "dadaptadagrad"
    class_name = "DAdaptAdaGrad"

    momentum: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the previous weights in the next ones."""
    eps: float = field(default=1e-6, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""


@frozen(kw_only=True)
class DAdaptSGDConfig(_GrowingConfig):
    """D-Adaptation of stochastic gradient descent (arXiv:2301.07733)."""

    name = "dadaptsgd"
    class_name = "DAdaptSGD"

    momentum: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the previous weights in the next ones."""

    def repaired(self, cls: type[Any]) -> type[Any]:
        """A subclass that skips steps while the norm of the first gradients, which it divides by, is zero."""

        class SkipsZeroGradients(cls):  # type: ignore[misc]
            def step(self, closure: Callable[[], float] | None = None) -> float | None:
                try:
                    loss: float | None = super().step(closure)
                except ZeroDivisionError:
                    return None
                return loss

        return SkipsZeroGradients


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """All of dadaptation."""
    return [
        DAdaptationConfig, DAdaptAdaGradConfig, DAdaptAdamConfig, DAdaptAdanConfig, DAdaptAdanIPConfig,
        DAdaptLionConfig, DAdaptSGDConfig,
    ]  # fmt: skip
