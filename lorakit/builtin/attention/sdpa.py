"""The attention backend `sdpa`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit import hookimpl
from lorakit.components import AttentionConfig

if TYPE_CHECKING:
    from lorakit.models.protocol import AttentionBackend


@frozen(kw_only=True)
class SdpaConfig(AttentionConfig):
    """PyTorch's fused attention: the fastest kernel that the device has for the shapes at hand."""

    name = "sdpa"

    def build(self) -> AttentionBackend:
        """`torch.nn.functional.scaled_dot_product_attention`."""
        from torch.nn.functional import scaled_dot_product_attention

        return scaled_dot_product_attention


@hookimpl
def register_attention_backends() -> list[type[AttentionConfig]]:
    """PyTorch's fused attention."""
    return [SdpaConfig]
