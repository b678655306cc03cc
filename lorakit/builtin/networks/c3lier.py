"""The network `c3lier`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit import hookimpl
from lorakit.components import NetworkConfig
from lorakit.networks.config import LoRAConfig

if TYPE_CHECKING:
    from lorakit.models.protocol import AdaptationTarget


@frozen(kw_only=True)
class C3LierConfig(LoRAConfig):
    """LoRA-C3Lier: adapters for all that LoRA-LierLa adapts, and for the ResNet, down- and upsampling blocks."""

    name = "c3lier"

    conv_rank: int = field(default=4, validator=v.ge(1))
    """Rank of the updates of 3×3 convolutions."""
    conv_alpha: float = field(default=1.0, validator=v.gt(0))
    """Strength of the updates of 3×3 convolutions: they are multiplied by conv_alpha / conv_rank."""

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """Those of the linear layers and 1×1 convolutions of all blocks, and those of the other convolutions."""
        from torch import nn

        from lorakit.networks.functions import is_pointwise

        if is_pointwise(target.module):
            return self.rank, self.alpha
        is_conv = target.block in {"resnet", "sampler"} and isinstance(target.module, nn.Conv2d)
        return (self.conv_rank, self.conv_alpha) if is_conv else None


@hookimpl
def register_networks() -> list[type[NetworkConfig]]:
    """LoRA-C3Lier."""
    return [C3LierConfig]
