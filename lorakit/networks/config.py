"""What networks of LoRA adapters have in common as components; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.components import NetworkConfig

if TYPE_CHECKING:
    from lorakit.models.protocol import AdaptationTarget
    from lorakit.networks.network import Network


@frozen(kw_only=True)
class LoRAConfig(NetworkConfig):
    """A network of LoRA adapters; a subclass says which layers get one, and of which rank."""

    rank: int = field(default=4, validator=v.ge(1))
    """Rank of the learnt updates: a higher one learns more detail and makes a larger file. 4 to 128 are usual."""
    alpha: float = field(default=1.0, validator=v.gt(0))
    """Strength of the updates: they are multiplied by alpha / rank, so a higher alpha acts like a higher learning
    rate. From 1 to the rank."""
    dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the numbers between the two factors that are dropped at random while training. 0.1 to 0.3 are usual."""
    rank_dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the ranks that are dropped at random, for each image, while training."""
    module_dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the adapters that are left out at random, for each image, while training."""

    dora: bool = False
    """Train the magnitude of each output apart from its direction (DoRA, Liu et al., 2024, arXiv:2402.09353): often
    better at low ranks, slower, and not read alike by all tools."""
    scale_weight_norms: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Largest norm of a layer's update: one that has grown beyond it is scaled back after each step, so that no layer
    overpowers the others. 1 is usual; no limit when absent."""

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """Rank and alpha of the adapter that a layer gets, or None if it gets none."""
        raise NotImplementedError(f"{type(self).__name__} does not say which layers it adapts")

    def build(self, targets: Sequence[AdaptationTarget]) -> Network:
        """The adapters, attached; all are of the given parts."""
        from lorakit.networks.dora import DoRAModule
        from lorakit.networks.dropout import DropoutRates
        from lorakit.networks.lora import LoRAModule, LoRANetwork

        module = DoRAModule if self.dora else LoRAModule

        def make(target: AdaptationTarget) -> LoRAModule | None:
            size = self.rank_and_alpha(target) if target.part in self.parts else None
            return module(target.key, target.module, *size) if size else None

        rates = DropoutRates(neuron=self.dropout, rank=self.rank_dropout, module=self.module_dropout)
        return LoRANetwork(targets, make, rates, self.scale_weight_norms).attach()
