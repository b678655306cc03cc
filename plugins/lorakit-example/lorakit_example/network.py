"""The network `attention_only`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api import LoRAConfig, NetworkConfig, hookimpl

if TYPE_CHECKING:
    from lorakit.api import AdaptationTarget

UNET = ("_to_q", "_to_k", "_to_v", "_to_out_0")
TEXT_ENCODER = ("_q_proj", "_k_proj", "_v_proj", "_out_proj")


@frozen(kw_only=True)
class AttentionOnlyConfig(LoRAConfig):
    """LoRA for the attention projections alone: files less than half as large as those of LoRA-LierLa."""

    name = "attention_only"

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """`rank` and `alpha` for attention projections, None for all other layers."""
        return (self.rank, self.alpha) if target.key.endswith(UNET + TEXT_ENCODER) else None


@hookimpl
def register_networks() -> list[type[NetworkConfig]]:
    """LoRA for the attention projections."""
    return [AttentionOnlyConfig]
