"""The optimizer `adafactor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, fields, frozen
from attrs import validators as v

from lorakit.api import OptimizerConfig, Problem, hookimpl
from lorakit.api.components import DENOISER_LR, TEXT_ENCODER_LR

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.api import ParameterGroup


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
        return ScheduledAdafactor(  # type: ignore[no-untyped-call]
            [{**group, **own_lr} for group in torch_groups(groups)],
            relative_step=self.relative_step,
            warmup_init=self.warmup_init,
            scale_parameter=self.scale_parameter,
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            beta1=self.beta1,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """Adafactor."""
    return [AdafactorConfig]
