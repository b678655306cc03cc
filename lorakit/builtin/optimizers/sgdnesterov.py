"""The optimizer `sgdnesterov`."""

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
class SGDNesterovConfig(OptimizerConfig):
    """Stochastic gradient descent with Nesterov momentum (Sutskever et al., 2013).

    Its steps are proportional to the gradient, so it needs a far higher learning rate than AdamW.
    """

    name = "sgdnesterov"
    usual_lr = 1.0

    momentum: float = field(default=0.9, validator=[v.gt(0), v.lt(1)])
    """Momentum factor."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """L2 penalty: this share of the weight is added to its gradient."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """`torch.optim.SGD`, fused where the device has a fused kernel."""
        import torch
        from torch.optim import SGD

        from lorakit.api import torch_groups

        fused = all(p.device.type in {"cpu", "cuda"} for group in groups for p in group.parameters)
        optimizer = SGD(torch_groups(groups), nesterov=True, fused=fused, **self.extra_options())
        for parameter in (p for group in groups for p in group.parameters):
            # PyTorch would leave it unset in a first step that a loss scaler skips, and use it in the next.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """SGD with Nesterov momentum."""
    return [SGDNesterovConfig]
