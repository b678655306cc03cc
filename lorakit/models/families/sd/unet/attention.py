"""Attention of the U-Net, computed by whatever backend was chosen.

B images, n tokens of the image, m tokens of the caption or the image, c and c' channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lorakit.models.interfaces import AttentionBackend


class Attention(nn.Module):
    """Projects queries, keys and values, and leaves the rest to an attention backend."""

    def __init__(self, channels: int, context_channels: int, heads: int, upcasts: bool = False) -> None:
        """Of tokens with so many channels to others with `context_channels`.

        With `upcasts` the backend computes in float32 whatever the number format. Raises ValueError where the heads
        do not share the channels evenly.
        """
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared by {heads} attention heads")
        self.heads = heads
        self.upcasts = upcasts
        self.backend: AttentionBackend = scaled_dot_product_attention
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """What tokens [B, n, c] take from a context [B, m, c'], themselves or a caption; [B, n, c]."""
        query, key, value = self.to_q(tokens), self.to_k(context), self.to_v(context)
        mixed = self.backend(self._split_heads(query), self._split_heads(key), self._split_heads(value))
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2).to(query.dtype))
        return out

    def _split_heads(self, projected: Tensor) -> Tensor:
        """[B, heads, tokens, channels of a head] of [B, tokens, c], in the number format that the backend gets."""
        heads = projected.view(*projected.shape[:2], self.heads, -1).transpose(1, 2)
        return heads.to(torch.promote_types(heads.dtype, torch.float32)) if self.upcasts else heads


def use_backend(unet: nn.Module, backend: AttentionBackend) -> None:
    """Let a backend compute all attention of a U-Net."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.backend = backend
