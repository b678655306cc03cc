"""The optimizer `adamw8bit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit import hookimpl
from lorakit.components import OptimizerConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.networks.network import ParameterGroup


@frozen(kw_only=True)
class AdamW8bitConfig(OptimizerConfig):
    """AdamW that keeps its state in 8 bits, a quarter of the memory (Dettmers et al., 2021, arXiv:2110.02861)."""

    name = "adamw8bit"
    requires = ("bitsandbytes",)

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update, so that it never is zero."""
    weight_decay: float = field(default=0.01, validator=v.ge(0))
    """Share of each weight, times the learning rate, that it loses at each step."""
    min_8bit_size: int = field(default=4096, validator=v.ge(0))
    """Tensors of fewer numbers than this keep their state in 32 bits."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The one of bitsandbytes."""
        from bitsandbytes.optim import AdamW8bit

        from lorakit.networks.network import torch_groups

        optimizer: Optimizer = AdamW8bit(
            torch_groups(groups),
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
        return optimizer


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """8-bit AdamW."""
    return [AdamW8bitConfig]
