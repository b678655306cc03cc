"""The attention backend `sdpa`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attrs import frozen

from lorakit.api.components import AttentionConfig
from lorakit.api.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.models.interfaces import AttentionBackend

_NAMES = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
"""What PyTorch calls the kernels."""


@frozen(kw_only=True)
class SdpaConfig(AttentionConfig):
    """PyTorch's fused attention: the fastest kernel that the device has for the shapes at hand."""

    name = "sdpa"

    kernels: tuple[Literal["cudnn", "flash", "efficient", "math"], ...] = ()
    """Kernels to use, the first of them that takes the shapes at hand: `cudnn`, `flash`, `efficient`, `math`. The last,
    which takes all, is used where no other one does. PyTorch chooses when empty."""

    def build(self) -> AttentionBackend:
        """`torch.nn.functional.scaled_dot_product_attention`, with these kernels."""
        from torch.nn.functional import scaled_dot_product_attention

        if not self.kernels:
            return scaled_dot_product_attention
        from torch.nn.attention import SDPBackend, sdpa_kernel

        order = [getattr(SDPBackend, _NAMES[name]) for name in dict.fromkeys((*self.kernels, "math"))]

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(order, set_priority=True):
                return scaled_dot_product_attention(query, key, value)

        return attention


@hookimpl
def register_attention_backends() -> list[type[AttentionConfig]]:
    """PyTorch's fused attention."""
    return [SdpaConfig]
