"""The transformer of Z-Image (Tongyi Lab, 2025): one stream of image and caption tokens.

Layers and tensors have the names of the original code, except in the attention, whose queries, keys and values are
layers of their own, with the names of diffusers: `to_q`, `to_k`, `to_v`, `to_out.0`, `norm_q`, `norm_k`.

B images in a micro-batch, h and w the sides of latents, n tokens of D channels, m tokens of a caption; T channels of
the time embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from attrs import frozen
from torch import Tensor, nn

from lorakit.models.families.flow.layers import (
    BackendAttention,
    rotary_at,
    rotary_table,
    rotate_pairs,
    time_waves,
)
from lorakit.models.memory.activation_checkpointing import CheckpointedBlock
from lorakit.models.weights.checkpoint import Settings

MULTIPLE = 32
"""Image and caption are each filled up to a multiple of so many tokens, which are attended to."""
PATCH = 2
"""Side of a token in latents."""
_TIME_WAVES = 256
_WIDEST_TIME = 256
_TIME_HIDDEN = 1024


@frozen(kw_only=True)
class ZImageSettings:
    """The arguments of diffusers' `ZImageTransformer2DModel` that differ between models."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    @classmethod
    def of(cls, settings: Settings) -> ZImageSettings:
        """Those that a config says; raises ValueError for a structure that no Z-Image has."""
        if settings.get("n_kv_heads", settings.get("n_heads", 30)) != settings.get("n_heads", 30):
            raise ValueError("n_kv_heads differs from n_heads")
        known: dict[str, Any] = {name: settings[name] for name in cls.__annotations__ if name in settings}
        for axes in {"axes_dims", "axes_lens"} & known.keys():
            known[axes] = tuple(known[axes])
        found = cls(**known)
        if sum(found.axes_dims) * found.n_heads != found.dim:
            raise ValueError(f"axes_dims = {list(found.axes_dims)} and n_heads = {found.n_heads} make no {found.dim}")
        return found

    @property
    def time_width(self) -> int:
        """T."""
        return min(self.dim, _WIDEST_TIME)

    @property
    def hidden(self) -> int:
        """Channels inside the MLPs."""
        return int(self.dim / 3 * 8)


class ZImageTransformer(nn.Module):
    """Predicts the direction from noise to image, that is −v, from noisy latents, the time and a caption."""

    rotary: tuple[Tensor, ...] = ()
    """The tables of the three axes; set by `set_rotary`, as no file holds them."""

    def __init__(self, settings: ZImageSettings) -> None:
        super().__init__()
        self.settings = settings
        width, channels = settings.dim, settings.in_channels * PATCH**2
        self.x_embedder = nn.Linear(channels, width)
        self.t_embedder = TimeEmbedder(settings.time_width)
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(settings.cap_feat_dim, settings.norm_eps), nn.Linear(settings.cap_feat_dim, width)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, width))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, width))
        refiners = range(settings.n_refiner_layers)
        self.noise_refiner = nn.ModuleList(Block(settings) for _ in refiners)
        self.context_refiner = nn.ModuleList(Block(settings, modulated=False) for _ in refiners)
        self.layers = nn.ModuleList(Block(settings) for _ in range(settings.n_layers))
        self.final_layer = FinalLayer(settings, channels)

    def set_rotary(self, device: torch.device) -> None:
        """Compute the tables of rotary positions."""
        axes = zip(self.settings.axes_lens, self.settings.axes_dims, strict=True)
        self.rotary = tuple(rotary_table(*axis, self.settings.rope_theta).to(device) for axis in axes)

    def forward(
        self, latents: Tensor, time: Tensor, caption: Tensor, lengths: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """−v, [B, C, h, w], of noisy latents of that shape at times [B] from 0 (noise) to 1 (image), float32.

        Captions are [B, m, c] with m a multiple of 32; `lengths`, int64 [B], counts their own tokens. `mask`, bool
        [B, m], is false behind the multiple of 32 that a caption is filled up to; None where all have the same.
        """
        height, width = latents.shape[2] // PATCH, latents.shape[3] // PATCH
        temb = self.t_embedder(time.float() * self.settings.t_scale, latents.dtype)
        numbers = torch.arange(caption.shape[1], device=caption.device).expand(len(caption), -1)
        own = (numbers < lengths.unsqueeze(1)).unsqueeze(2)
        context = torch.where(own, self.cap_embedder(caption), self.cap_pad_token)
        rotation = self._rotation(F.pad((numbers + 1).unsqueeze(2), (0, 2)))
        for block in self.context_refiner:
            context = block(context, rotation, mask=mask)
        image = self._image_tokens(latents)
        filled = -(-lengths // MULTIPLE) * MULTIPLE
        image_rotation = self._rotation(_grid(filled + 1, height, width, image.shape[1]))
        for block in self.noise_refiner:
            image = block(image, image_rotation, temb)
        tokens = torch.cat([image, context], dim=1)
        rotation = torch.cat([image_rotation, rotation], dim=1)
        mask = None if mask is None else F.pad(mask, (image.shape[1], 0), value=True)
        for block in self.layers:
            tokens = block(tokens, rotation, temb, mask)
        out = self.final_layer(tokens[:, : height * width], temb)
        return _unpatched(out, height, width)

    def _image_tokens(self, latents: Tensor) -> Tensor:
        """The embedded patches [B, n, D], filled up to a multiple of 32."""
        image: Tensor = self.x_embedder(patches(latents))
        fill = self.x_pad_token.expand(len(image), -image.shape[1] % MULTIPLE, -1)
        return torch.cat([image, fill], dim=1)

    def _rotation(self, positions: Tensor) -> Tensor:
        return rotary_at(self.rotary, positions)


class TimeEmbedder(nn.Module):
    """An MLP that makes of the waves of a time what blocks are modulated by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_TIME_WAVES, _TIME_HIDDEN), nn.SiLU(), nn.Linear(_TIME_HIDDEN, width))

    def forward(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T] of times [B], which are float32 up to their waves."""
        out: Tensor = self.mlp(time_waves(times, _TIME_WAVES).to(dtype))
        return out


class Block(CheckpointedBlock):
    """Attention and a gated MLP; most blocks are modulated by the time."""

    def __init__(self, settings: ZImageSettings, modulated: bool = True) -> None:
        super().__init__()
        width, eps = settings.dim, settings.norm_eps
        self.attention = Attention(width, settings.n_heads)
        self.feed_forward = FeedForward(width, settings.hidden)
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.adaLN_modulation = nn.Sequential(nn.Linear(settings.time_width, 4 * width)) if modulated else None

    def forward(
        self, tokens: Tensor, rotation: Tensor, temb: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """[B, n, D] of tokens of that shape; `mask` is bool [B, n], false for padding between captions."""
        if self.adaLN_modulation is None or temb is None:
            tokens = tokens + self.attention_norm2(self.attention(self.attention_norm1(tokens), rotation, mask))
            plain: Tensor = tokens + self.ffn_norm2(self.feed_forward(self.ffn_norm1(tokens)))
            return plain
        scale, gate, mlp_scale, mlp_gate = self.adaLN_modulation(temb).unsqueeze(1).chunk(4, dim=2)
        attended = self.attention(self.attention_norm1(tokens) * (1 + scale), rotation, mask)
        tokens = tokens + gate.tanh() * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(tokens) * (1 + mlp_scale))
        out: Tensor = tokens + mlp_gate.tanh() * self.ffn_norm2(fed)
        return out


class Attention(BackendAttention):
    """Self-attention with normed and rotated queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-5) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width, bias=False))

    def forward(self, tokens: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, n, D] of tokens of that shape."""
        query, key, value = (
            layer(tokens).view(*tokens.shape[:2], self.heads, -1) for layer in (self.to_q, self.to_k, self.to_v)
        )
        query, key = rotate_pairs(self.norm_q(query), rotation), rotate_pairs(self.norm_k(key), rotation)
        out: Tensor = self.to_out(self.mix(query, key, value, mask))
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, n, D] of tokens of that shape."""
        out: Tensor = self.w2(F.silu(self.w1(tokens)) * self.w3(tokens))
        return out


class FinalLayer(nn.Module):
    """Tokens to patches of latents."""

    def __init__(self, settings: ZImageSettings, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(settings.dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(settings.dim, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(settings.time_width, settings.dim))

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        """[B, n, 4·C] of tokens [B, n, D]."""
        out: Tensor = self.linear(self.norm_final(tokens) * (1 + self.adaLN_modulation(temb)).unsqueeze(1))
        return out


def patches(latents: Tensor) -> Tensor:
    """[B, n, 4·C] of latents [B, C, h, w], row by row; in a patch the channel counts fastest."""
    count, channels, height, width = latents.shape
    blocks = latents.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, PATCH**2 * channels)


def _unpatched(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, C, h, w] of patches [B, n, 4·C], in so many rows and columns."""
    blocks = tokens.view(len(tokens), height, width, PATCH, PATCH, -1)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height * PATCH, width * PATCH)


def _grid(first: Tensor, height: int, width: int, count: int) -> Tensor:
    """Positions (first, y, x) of an image's tokens, int64 [B, count, 3], `first` one for each image; then (0, 0, 0)."""
    rows, columns = (torch.arange(side, device=first.device) for side in (height, width))
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    grid = torch.cat([first.view(-1, 1, 1).expand(-1, len(places), 1), places.expand(len(first), -1, -1)], dim=2)
    return F.pad(grid, (0, 0, 0, count - len(places)))
