"""The optimizers of bitsandbytes: 8-bit states, and states that are paged to CPU RAM when GPU memory is full.

All of them run on a CPU too, where nothing is paged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import OptimizerConfig, hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.api import ParameterGroup


@frozen(kw_only=True)
class BitsandbytesConfig(OptimizerConfig):
    """An optimizer of bitsandbytes; a subclass gives the class's name and has its options as fields."""

    requires = ("bitsandbytes",)
    class_name: ClassVar[str]
    """Its name in `bitsandbytes.optim`."""

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The class of `bitsandbytes.optim`."""
        from bitsandbytes import optim

        from lorakit.api import torch_groups

        highest = max(group.lr for group in groups)
        optimizer: Optimizer = getattr(optim, self.class_name)(torch_groups(groups), lr=highest, **self.extra_options())
        return optimizer


@frozen(kw_only=True, slots=False)  # only one base of a class can have slots
class _In8BitsConfig(BitsandbytesConfig):
    """The options of all with 8-bit states."""

    min_8bit_size: int = field(default=4096, validator=v.ge(0))
    """Tensors with fewer elements than this keep a 32-bit state."""


@frozen(kw_only=True)
class _AdamWConfig(BitsandbytesConfig):
    """The options of all kinds of AdamW."""

    usual_lr = 1e-4

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the running averages of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=v.gt(0))
    """Added to the denominator of the update for numerical stability."""
    weight_decay: float = field(default=0.01, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""


@frozen(kw_only=True)
class PagedAdamWConfig(_AdamWConfig):
    """AdamW with a 32-bit state that is paged to CPU RAM when GPU memory is full.

    Only tensors of 100,000 elements or more are paged, so it is of little use for LoRA.
    """

    name = "pagedadamw"
    class_name = "PagedAdamW"


@frozen(kw_only=True)
class PagedAdamW32bitConfig(PagedAdamWConfig):
    """The same as `pagedadamw`; bitsandbytes has it under both names."""

    name = "pagedadamw32bit"
    class_name = "PagedAdamW32bit"


@frozen(kw_only=True)
class AdamW8bitConfig(_In8BitsConfig, _AdamWConfig):
    """AdamW with an 8-bit state, a quarter of the memory (Dettmers et al., 2021, arXiv:2110.02861)."""

    name = "adamw8bit"
    class_name = "AdamW8bit"


@frozen(kw_only=True)
class PagedAdamW8bitConfig(AdamW8bitConfig):
    """`adamw8bit` with a paged state; see `pagedadamw`."""

    name = "pagedadamw8bit"
    class_name = "PagedAdamW8bit"


@frozen(kw_only=True)
class Lion8bitConfig(_In8BitsConfig):
    """Lion (Chen et al., 2023, arXiv:2302.06675) with an 8-bit state, a quarter of the memory.

    Needs a learning rate three to ten times lower than AdamW's.
    """

    name = "lion8bit"
    usual_lr = 3e-5
    class_name = "Lion8bit"

    betas: tuple[float, float] = field(default=(0.9, 0.99), validator=v.deep_iterable([v.ge(0), v.lt(1)]))
    """Decay of the update direction and of the momentum."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """Decoupled weight decay: each step subtracts this share of the weight, times the learning rate."""


@frozen(kw_only=True)
class PagedLion8bitConfig(Lion8bitConfig):
    """`lion8bit` with a paged state; see `pagedadamw`."""

    name = "pagedlion8bit"
    class_name = "PagedLion8bit"


@frozen(kw_only=True)
class SGDNesterov8bitConfig(_In8BitsConfig):
    """Stochastic gradient descent with 8-bit momentum.

    bitsandbytes uses plain momentum, without the look-ahead of `sgdnesterov`.
    """

    name = "sgdnesterov8bit"
    usual_lr = 1.0
    class_name = "SGD8bit"

    momentum: float = field(default=0.9, validator=[v.gt(0), v.lt(1)])
    """Momentum factor."""
    weight_decay: float = field(default=0.0, validator=v.ge(0))
    """L2 penalty: this share of the weight is added to its gradient."""


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """All optimizers of bitsandbytes that sd-scripts has."""
    return [
        AdamW8bitConfig, Lion8bitConfig, PagedAdamWConfig, PagedAdamW32bitConfig, PagedAdamW8bitConfig,
        PagedLion8bitConfig, SGDNesterov8bitConfig,
    ]  # fmt: skip
