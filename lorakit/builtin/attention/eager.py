"""The attention backend `eager`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.components import AttentionConfig
from lorakit.api.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.models.interfaces import AttentionBackend


@frozen(kw_only=True)
class EagerConfig(AttentionConfig):
    """Attention written out, step by step: slow and hungry for memory, but the same on every device."""

    name = "eager"

    def build(self) -> AttentionBackend:
        """Two matrix products with a softmax between them."""
        return _attention


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v of [B, heads, tokens, d]; q·kᵀ and the softmax in float32, where nothing overflows."""
    scale: float = query.shape[-1] ** -0.5
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)
    return scores.softmax(-1).to(value.dtype) @ value


@hookimpl
def register_attention_backends() -> list[type[AttentionConfig]]:
    """Attention written out."""
    return [EagerConfig]
