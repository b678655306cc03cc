"""The optimizers of PyTorch, transformers and lion-pytorch, and any optimizer class by its import path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, fields, frozen
from attrs import validators as v

from lorakit.api import OptimizerConfig, Problem, check_import_path, hookimpl, import_class, instantiate
from lorakit.api.components import DENOISER_LR, TEXT_ENCODER_LR

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.api import ParameterGroup


@frozen(kw_only=True)
class AdamWOptions(OptimizerConfig):
    """The options of all kinds of AdamW."""

    elementwise = True
    usual_lr = 1e-4

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""
    weight_decay: float = field(default=0.01, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""


@frozen(kw_only=True)
class LionOptions(OptimizerConfig):
    """The options of all kinds of Lion."""

    elementwise = True
    usual_lr = 3e-5

    betas: tuple[float, float] = field(default=(0.9, 0.99), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the update direction and of the momentum."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""


@frozen(kw_only=True)
class SGDOptions(OptimizerConfig):
    """The options of stochastic gradient descent with momentum."""

    elementwise = True
    usual_lr = 1.0

    momentum: float = field(default=0.9, validator=[v.gt(0), v.lt(1)])
    """Momentum factor."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """L2 penalty: this share of the weight is added to its gradient."""


def _has_fused_kernel(groups: Sequence[ParameterGroup]) -> bool:
    from torch.utils import _foreach_utils

    devices = _foreach_utils._get_fused_kernels_supported_devices()
    return all(p.device.type in devices for group in groups for p in group.parameters)


@frozen(kw_only=True)
class AdamWConfig(AdamWOptions):
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

    name = "adamw"

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`torch.optim.AdamW`, fused where the device has a fused kernel."""
        from torch.optim import AdamW

        from lorakit.api import torch_groups
        from lorakit.builtin.optimizers._fused_adamw import FusedAdamW

        kind = FusedAdamW if _has_fused_kernel(groups) else AdamW
        return kind(torch_groups(groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@frozen(kw_only=True)
class SGDNesterovConfig(SGDOptions):
    """Stochastic gradient descent with Nesterov momentum (Sutskever et al., 2013).

    Its steps are proportional to the gradient, so it needs a far higher learning rate than AdamW.
    """

    name = "sgdnesterov"

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`torch.optim.SGD`, fused where the device has a fused kernel."""
        import torch
        from torch.optim import SGD

        from lorakit.api import torch_groups

        fused = _has_fused_kernel(groups)
        optimizer = SGD(torch_groups(groups), nesterov=True, fused=fused, **self.extra_options())
        for parameter in (p for group in groups for p in group.parameters):
            # PyTorch would leave it unset in a first step that a loss scaler skips, and use it in the next.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


@frozen(kw_only=True)
class LionConfig(LionOptions):
    """Lion: the sign of an interpolated momentum (Chen et al., 2023, arXiv:2302.06675).

    Needs a learning rate three to ten times lower than AdamW's.
    """

    name = "lion"
    requires = ("lion-pytorch",)

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`lion_pytorch.Lion`."""
        from lion_pytorch import Lion

        from lorakit.api import torch_groups

        optimizer: Optimizer = Lion(torch_groups(groups), betas=self.betas, weight_decay=self.weight_decay)
        return optimizer


@frozen(kw_only=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor: Adam with factored second moments, which saves memory (Shazeer and Stern, 2018, arXiv:1804.04235)."""

    name = "adafactor"
    usual_lr = 1e-4

    relative_step: bool = False
    """Compute the learning rate as min(0.01, 1/√step), times the LR schedule's factor; `lr` is ignored."""
    warmup_init: bool = False
    """With `relative_step`, warm up with the learning rate 1e-6 · step."""
    scale_parameter: bool = False
    """Scale the learning rate by the root mean square of each weight matrix."""
    clip_threshold: float = field(default=1.0, validator=v.gt(0))
    """Clip updates to this root mean square, before the learning rate."""
    decay_rate: float = field(default=-0.8, validator=v.lt(0))
    """Decay of the running average of the squared gradient: 1 − step^decay_rate."""
    beta1: float | None = field(default=None, validator=v.optional([v.ge(0), v.lt(1)]))
    """Decay of the running average of the update; without one when absent, which saves memory."""
    eps: tuple[float, float] = field(default=(1e-30, 1e-3), validator=v.deep_iterable(v.ge(0)))
    """Added to the squared gradient; and the lower bound of the root mean square for `scale_parameter`."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""

    def problems(self) -> Iterator[Problem]:
        """Learning rates that would have no effect."""
        if self.warmup_init and not self.relative_step:
            yield Problem("warmup_init", "needs relative_step = true", "For a warm-up of `lr`, see lr_scheduler")
        if not self.relative_step:
            return
        hint = "leave it out, or set relative_step = false"
        if self.lr != fields(AdafactorConfig).lr.default:
            yield Problem("lr", "has no effect with relative_step = true", hint)
        for key in (DENOISER_LR, TEXT_ENCODER_LR):
            if getattr(self, key) is not None and any(self.lrs_from(key)):
                yield Problem(key, "has no effect with relative_step = true", hint)

    @property
    def supports_lr_multipliers(self) -> bool:
        """Not with `relative_step`, which ignores learning rates."""
        return not self.relative_step

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`transformers.Adafactor`; with `relative_step` the groups' learning rate is the schedule's factor."""
        from transformers.optimization import Adafactor

        from lorakit.api import torch_groups

        class ScheduledAdafactor(Adafactor):
            @staticmethod
            def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> Any:
                factor = param_group["lr"] if param_group["relative_step"] else 1.0
                return factor * Adafactor._get_lr(param_group, param_state)  # type: ignore[no-untyped-call]

        own_lr = {"lr": 1.0} if self.relative_step else {}
        own_groups = [{**group, **own_lr} for group in torch_groups(groups)]
        return ScheduledAdafactor(own_groups, **self.extra_options())  # type: ignore[no-untyped-call]


@frozen(kw_only=True)
class OptimizerByPathConfig(OptimizerConfig):
    """Any optimizer class of an installed package, by its import path, such as `torch.optim.RAdam`."""

    name = "package.Class"
    takes_import_path = True

    args: Mapping[str, Any] = field(factory=dict)
    """Arguments of the class, such as `{ betas = [0.9, 0.99] }`; the learning rate is `lr`."""

    def problems(self) -> Iterator[Problem]:
        """Checks that the class exists, and that no argument is set elsewhere."""
        yield from super().problems()
        yield from check_import_path(self.name)
        for key in {"lr", "params"} & self.args.keys():
            yield Problem(f"args.{key}", "is not an argument here", "set optimizer.lr" if key == "lr" else "")

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """An instance of the class. Raises ConfigError if it is no optimizer or rejects the arguments."""
        from torch.optim import Optimizer

        from lorakit.api import torch_groups

        cls = import_class(self.name, Optimizer, "optimizer")
        highest = max(group.lr for group in groups)
        return instantiate(cls, torch_groups(groups), self.args, "optimizer", lr=highest)


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """All of them."""
    return [AdamWConfig, SGDNesterovConfig, LionConfig, AdafactorConfig, OptimizerByPathConfig]
