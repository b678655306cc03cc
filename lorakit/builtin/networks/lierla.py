"""The network `lierla`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit import hookimpl
from lorakit.components import NetworkConfig
from lorakit.networks.blocks import BlockwiseLoRAConfig

if TYPE_CHECKING:
    from lorakit.models.protocol import AdaptationTarget


@frozen(kw_only=True)
class LierlaConfig(BlockwiseLoRAConfig):
    """LoRA-LierLa: adapters for the linear layers and 1×1 convolutions of the transformers, and the text encoder."""

    name = "lierla"

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """The same for all layers, or for all of a block."""
        from lorakit.networks.functions import is_pointwise

        adapted = target.block in {"transformer", "text_encoder"} and is_pointwise(target.module)
        return self.in_block(target, (self.rank, self.alpha), self.block_ranks, self.block_alphas) if adapted else None


@hookimpl
def register_networks() -> list[type[NetworkConfig]]:
    """LoRA-LierLa."""
    return [LierlaConfig]
