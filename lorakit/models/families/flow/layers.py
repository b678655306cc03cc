"""Small layers of transformers: attention by a backend, waves of the time, and rotary positions.

B images in a micro-batch, n tokens, H heads of d channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.interfaces import AttentionBackend


class BackendAttention(nn.Module):
    """Attention whose softmax(q·kᵀ/√d)·v is left to an attention backend."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: AttentionBackend = F.scaled_dot_product_attention

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, n, H·d] of queries, keys and values [B, n, H, d]; `mask` is bool [B, n], false for padding."""
        query, key, value = (own.to(value.dtype).transpose(1, 2) for own in (query, key, value))
        mixed = self.backend(query, key, value, None if mask is None else mask[:, None, None])
        return mixed.transpose(1, 2).flatten(2).to(value.dtype)


def use_backend(module: nn.Module, backend: AttentionBackend) -> None:
    """Let a backend compute all attention in a module."""
    for own in module.modules():
        if isinstance(own, BackendAttention):
            own.backend = backend


def time_waves(times: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Cosines, then sines of times [B] at width/2 frequencies, period^(−2i/width); at least float32 [B, width].

    Times are in float32: in bfloat16, times above 512 would move in steps of 4.
    """
    half, dtype = width // 2, torch.promote_types(times.dtype, torch.float32)
    exponents = -math.log(period) * torch.arange(half, dtype=dtype, device=times.device) / half
    angles = times.to(dtype).unsqueeze(1) * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotary_table(positions: int, width: int, theta: float) -> Tensor:
    """Cosines and sines of position·theta^(−2i/width), computed in float64; float32 [positions, width/2, 2]."""
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64, device="cpu"), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotary_at(tables: Sequence[Tensor], positions: Tensor) -> Tensor:
    """The rotations of tokens at positions on several axes, int64 [B, n, axes], one table for each; [B, n, d/2, 2]."""
    return torch.cat([table[positions[..., axis]] for axis, table in enumerate(tables)], dim=-2)


def rotate_pairs(heads: Tensor, rotation: Tensor) -> Tensor:
    """Heads [B, n, H, d], each two neighbouring channels turned as `rotation` [B, n, d/2, 2] says, in float32 or more.

    Rotary positions (Su et al., 2021, arXiv:2104.09864).
    """
    pairs = heads.to(torch.promote_types(heads.dtype, torch.float32)).view(*heads.shape[:-1], -1, 2)
    first, second = pairs.unbind(-1)
    cosine, sine = rotation.unsqueeze(-3).unbind(-1)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(heads.dtype)
