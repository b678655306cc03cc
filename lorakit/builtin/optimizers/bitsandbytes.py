"""The optimizers of bitsandbytes: states in 8 bits, and states that the CPU's memory takes over when the GPU's is full.

All of them run on a CPU too, where nothing is paged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import OptimizerConfig
from lorakit.api.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.networks.network import ParameterGroup


@frozen(kw_only=True)
class BitsandbytesConfig(OptimizerConfig):
    """An optimizer of bitsandbytes; a subclass names the class and has its options as fields."""

    requires = ("bitsandbytes",)
    class_name: ClassVar[str]
    """What it is called in `bitsandbytes.optim`."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The one of bitsandbytes."""
        from bitsandbytes import optim

        from lorakit.networks.network import torch_groups

        highest = max(group.lr for group in groups)
        optimizer: Optimizer = getattr(optim, self.class_name)(torch_groups(groups), lr=highest, **self.extra_options())
        return optimizer


@frozen(kw_only=True, slots=False)  # because a class can have but one base with slots of its own
class _In8BitsConfig(BitsandbytesConfig):
    """What all have that keep their state in 8 bits."""

    min_8bit_size: int = field(default=4096, validator=v.ge(0))
    """Tensors of fewer numbers than this keep their state in 32 bits."""


@frozen(kw_only=True)
class _AdamWConfig(BitsandbytesConfig):
    """What all kinds of AdamW have."""

    usual_lr = 1e-4

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update, so that it never is zero."""
    weight_decay: float = field(default=0.01, validator=v.ge(0))
    """Share of each weight, times the learning rate, that it loses at each step."""


@frozen(kw_only=True)
class PagedAdamWConfig(_AdamWConfig):
    """AdamW whose state, in 32 bits, moves to the CPU's memory when the GPU's is full.

    Only of tensors of 100,000 numbers or more, so with LoRA of little use.
    """

    name = "pagedadamw"
    class_name = "PagedAdamW"


@frozen(kw_only=True)
class PagedAdamW32bitConfig(PagedAdamWConfig):
    """The same as `pagedadamw`, under the other name that it has."""

    name = "pagedadamw32bit"
    class_name = "PagedAdamW32bit"


@frozen(kw_only=True)
class AdamW8bitConfig(_In8BitsConfig, _AdamWConfig):
    """AdamW that keeps its state in 8 bits, a quarter of the memory (Dettmers et al., 2021, arXiv:2110.02861)."""

    name = "adamw8bit"
    class_name = "AdamW8bit"


@frozen(kw_only=True)
class PagedAdamW8bitConfig(AdamW8bitConfig):
    """`adamw8bit` whose state moves to the CPU's memory when the GPU's is full; see `pagedadamw`."""

    name = "pagedadamw8bit"
    class_name = "PagedAdamW8bit"


@frozen(kw_only=True)
class Lion8bitConfig(_In8BitsConfig):
    """Lion (Chen et al., 2023, arXiv:2302.06675) that keeps its state in 8 bits, a quarter of the memory.

    Wants a learning rate three to ten times lower than AdamW's.
    """

    name = "lion8bit"
    usual_lr = 3e-5
    class_name = "Lion8bit"

    betas: tuple[float, float] = field(default=(0.9, 0.99), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the update direction and of the momentum."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Share of each weight, times the learning rate, that it loses at each step."""


@frozen(kw_only=True)
class PagedLion8bitConfig(Lion8bitConfig):
    """`lion8bit` whose state moves to the CPU's memory when the GPU's is full; see `pagedadamw`."""

    name = "pagedlion8bit"
    class_name = "PagedLion8bit"


@frozen(kw_only=True)
class SGDNesterov8bitConfig(_In8BitsConfig):
    """Gradient descent with momentum that is kept in 8 bits.

    bitsandbytes takes the momentum as it is, without Nesterov's look ahead, which `sgdnesterov` has.
    """

    name = "sgdnesterov8bit"
    usual_lr = 1.0
    class_name = "SGD8bit"

    momentum: float = field(default=0.9, validator=[v.gt(0), v.lt(1)])
    """Decay of the running sum of gradients."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Share of each weight that is added to its gradient."""


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """All that sd-scripts has of bitsandbytes."""
    return [
        AdamW8bitConfig, Lion8bitConfig, PagedAdamWConfig, PagedAdamW32bitConfig, PagedAdamW8bitConfig,
        PagedLion8bitConfig, SGDNesterov8bitConfig,
    ]  # fmt: skip
