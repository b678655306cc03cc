"""The optimizers of bitsandbytes: 8-bit states, and states that are paged to CPU RAM when GPU memory is full.

All of them run on a CPU too, where nothing is paged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import OptimizerConfig, hookimpl
from lorakit.builtin.optimizers.standard import AdamWOptions, LionOptions, SGDOptions

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
        """The class of `bitsandbytes.optim`; unless it pages, its steps do not wait for the device."""
        from bitsandbytes import optim

        from lorakit.api import torch_groups
        from lorakit.builtin.optimizers._without_waits import without_waits

        kind, highest = without_waits(getattr(optim, self.class_name)), max(group.lr for group in groups)
        optimizer: Optimizer = kind(torch_groups(groups), lr=highest, **self.extra_options())
        return optimizer


@frozen(kw_only=True, slots=False)  # only one base of a class can have slots
class _In8BitsConfig(BitsandbytesConfig):
    """The options of all with 8-bit states."""

    min_8bit_size: int = field(default=4096, validator=v.ge(0))
    """Parameter groups with fewer elements than this keep a 32-bit state."""


@frozen(kw_only=True)
class PagedAdamWConfig(BitsandbytesConfig, AdamWOptions):
    """AdamW with a 32-bit state that is paged to CPU RAM when GPU memory is full.

    Only parameter groups of 100,000 elements or more are paged.
    """

    name = "pagedadamw"
    class_name = "PagedAdamW"


@frozen(kw_only=True)
class PagedAdamW32bitConfig(PagedAdamWConfig):
    """The same as `pagedadamw`; bitsandbytes has it under both names."""

    name = "pagedadamw32bit"
    class_name = "PagedAdamW32bit"


@frozen(kw_only=True)
class AdamW8bitConfig(_In8BitsConfig, AdamWOptions):
    """AdamW with an 8-bit state, a quarter of the memory (Dettmers et al., 2021, arXiv:2110.02861)."""

    name = "adamw8bit"
    class_name = "AdamW8bit"


@frozen(kw_only=True)
class PagedAdamW8bitConfig(AdamW8bitConfig):
    """`adamw8bit` with a paged state; see `pagedadamw`."""

    name = "pagedadamw8bit"
    class_name = "PagedAdamW8bit"


@frozen(kw_only=True)
class Lion8bitConfig(LionOptions, _In8BitsConfig):
    """Lion (Chen et al., 2023, arXiv:2302.06675) with an 8-bit state, a quarter of the memory.

    Needs a learning rate three to ten times lower than AdamW's.
    """

    name = "lion8bit"
    class_name = "Lion8bit"


@frozen(kw_only=True)
class PagedLion8bitConfig(Lion8bitConfig):
    """`lion8bit` with a paged state; see `pagedadamw`."""

    name = "pagedlion8bit"
    class_name = "PagedLion8bit"


@frozen(kw_only=True)
class SGDNesterov8bitConfig(SGDOptions, _In8BitsConfig):
    """Stochastic gradient descent with 8-bit momentum.

    bitsandbytes uses plain momentum, without the look-ahead of `sgdnesterov`.
    """

    name = "sgdnesterov8bit"
    class_name = "SGD8bit"


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """All optimizers of bitsandbytes that sd-scripts has."""
    return [
        AdamW8bitConfig, Lion8bitConfig, PagedAdamWConfig, PagedAdamW32bitConfig, PagedAdamW8bitConfig,
        PagedLion8bitConfig, SGDNesterov8bitConfig,
    ]  # fmt: skip
