"""The built-in attention backends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attrs import frozen

from lorakit.api import AttentionConfig, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.api import AttentionBackend

_NAMES = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
"""The members of `torch.nn.attention.SDPBackend`, by the name in configs."""


@frozen(kw_only=True)
class SdpaConfig(AttentionConfig):
    """PyTorch's fused attention, with the fastest kernel that the device has for the shapes."""

    name = "sdpa"

    kernels: tuple[Literal["cudnn", "flash", "efficient", "math"], ...] = ()
    """Kernels to use, in order of preference: `cudnn`, `flash`, `efficient`, `math`. The first that supports the shapes
    and masks is used; `math` supports all and is the fallback. When empty, PyTorch chooses."""

    def build(self) -> AttentionBackend:
        """`torch.nn.functional.scaled_dot_product_attention`, with these kernels."""
        from torch.nn.functional import scaled_dot_product_attention

        if not self.kernels:
            return scaled_dot_product_attention
        from torch.nn.attention import SDPBackend, sdpa_kernel

        order = [getattr(SDPBackend, _NAMES[name]) for name in dict.fromkeys((*self.kernels, "math"))]

        def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
            with sdpa_kernel(order, set_priority=True):
                return scaled_dot_product_attention(query, key, value, mask)

        return attention


@frozen(kw_only=True)
class EagerConfig(AttentionConfig):
    """Attention written out as two matrix products: slow and memory-hungry, but available on every device."""

    name = "eager"

    def build(self) -> AttentionBackend:
        """Two matrix products with a softmax between them."""
        return _attention


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
    """softmax(q·kᵀ/√d)·v of [B, heads, tokens, d]; q·kᵀ and the softmax in float32, where nothing overflows."""
    scale: float = query.shape[-1] ** -0.5
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).to(value.dtype) @ value


@hookimpl
def register_attention_backends() -> list[type[AttentionConfig]]:
    """PyTorch's fused attention, and attention written out."""
    return [SdpaConfig, EagerConfig]
