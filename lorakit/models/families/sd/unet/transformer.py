"""Transformers: every place of the image looks at all others, and at the caption.

B images, n = h·w tokens of the image, m tokens of the caption, c channels of the image, c' of the caption.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.families.sd.unet.attention import Attention
from lorakit.models.families.sd.unet_config import Level, UNetConfig
from lorakit.models.memory.activation_checkpointing import CheckpointedBlock
from lorakit.models.memory.channels_last import memory_format_of


class Transformer2DModel(nn.Module):
    """Turns an image into tokens, lets transformer blocks work on them, and adds the outcome to the image."""

    def __init__(self, settings: UNetConfig, level: Level) -> None:
        super().__init__()
        channels, self.projects_tokens = level.channels, settings.use_linear_projection
        self.norm = nn.GroupNorm(settings.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.projects_tokens else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, level.context_channels, level.heads, settings.upcast_attention)
            for _ in range(level.depth)
        )
        self.proj_out = nn.Linear(channels, channels) if self.projects_tokens else nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[B, c, h, w] of an image of that shape and a caption [B, m, c']."""
        tokens = self._to_tokens(self.norm(hidden_states))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states)
        return self._to_image(tokens, hidden_states) + hidden_states

    def _to_tokens(self, hidden_states: Tensor) -> Tensor:
        """[B, n, c] of [B, c, h, w]."""
        hidden: Tensor = hidden_states if self.projects_tokens else self.proj_in(hidden_states)
        tokens = hidden.flatten(2).transpose(1, 2)
        return self.proj_in(tokens) if self.projects_tokens else tokens

    def _to_image(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The tokens [B, n, c] as an image with the shape of another one, [B, c, h, w]."""
        hidden: Tensor = self.proj_out(tokens) if self.projects_tokens else tokens
        hidden_states = hidden.transpose(1, 2).reshape(like.shape).contiguous(memory_format=memory_format_of(like))
        return hidden_states if self.projects_tokens else self.proj_out(hidden_states)


class BasicTransformerBlock(CheckpointedBlock):
    """Self-attention, attention to the caption and an MLP, each added to what it reads (Vaswani et al., 2017)."""

    def __init__(self, channels: int, context_channels: int, heads: int, upcasts: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads, upcasts)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads, upcasts)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[B, n, c] of tokens of that shape and a caption [B, m, c']."""
        # A sum lies in memory as its first term does, and the tokens that come in may be an image's, transposed.
        normalised = self.norm1(tokens)
        tokens = self.attn1(normalised, normalised) + tokens
        tokens = self.attn2(self.norm2(tokens), encoder_hidden_states) + tokens
        out: Tensor = self.ff(self.norm3(tokens)) + tokens
        return out


class FeedForward(nn.Module):
    """An MLP with four times the channels inside, half of its first layer's outputs gates for the other half."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The number in the middle belongs to a dropout, which models have no weights for.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, n, c] of [B, n, c]."""
        out: Tensor = self.net(tokens)
        return out


class GEGLU(nn.Module):
    """x·GELU(g) of two projections, x and g (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 2 * outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, n, outputs] of [B, n, inputs]."""
        hidden, gates = self.proj(tokens).chunk(2, dim=-1)
        out: Tensor = hidden * F.gelu(gates)
        return out
