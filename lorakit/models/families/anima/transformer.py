"""The transformer of Cosmos-Predict2 (NVIDIA, 2025), text to image, as Anima has it, in plain PyTorch.

Its tensors and layers have the names that they have in the original code, since LoRA files have them, too.

B images, C latent channels, h and w the sides of latents, n = h/2 · w/2 tokens of D channels, m tokens of the caption
with D' channels, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.families.anima.structure import PATCH, TransformerConfig
from lorakit.models.families.flow.layers import BackendAttention, time_waves
from lorakit.models.memory.activation_checkpointing import CheckpointedBlock

_EPS = 1e-6
_THETA = 10000.0

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of tokens, [n, d]; the second half repeats the first."""


class Transformer(nn.Module):
    """Predicts from noisy latents, time and a caption the velocity ε − x₀."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed((config.in_channels + 1) * PATCH**2, width)
        self.t_embedder = nn.Sequential(Sinusoid(width), TimestepEmbedding(width))
        self.t_embedding_norm = nn.RMSNorm(width, _EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """[B, C, h, w] of noisy latents of that shape, times [B] from 0 to 1, and captions [B, m, D']."""
        height, width = latents.shape[2] // PATCH, latents.shape[3] // PATCH
        # The last channel is 1 where an image is only padding, which it is nowhere.
        tokens = self.x_embedder(torch.cat([latents, torch.zeros_like(latents[:, :1])], dim=1))
        waves = self.t_embedder[0](timesteps).to(latents.dtype)
        shared, time = self.t_embedder[1](waves), self.t_embedding_norm(waves)
        rotation = rotation_of_tokens(self.config, height, width, latents.device, latents.dtype)
        for block in self.blocks:
            tokens = block(tokens, context, time, shared, rotation)
        patches: Tensor = self.final_layer(tokens, time, shared)
        # Rows and columns of a patch come before its channels, other than in what `x_embedder` reads.
        image = patches.view(len(patches), height, width, PATCH, PATCH, -1)
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Patches(nn.Module):
    """Squares of an image become tokens."""

    def forward(self, image: Tensor) -> Tensor:
        """[B, h/2 · w/2, c · 2 · 2] of [B, c, h, w], row by row."""
        count, channels, height, width = image.shape
        squares = image.view(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Makes tokens of latents."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(Patches(), nn.Linear(inputs, width, bias=False))

    def forward(self, image: Tensor) -> Tensor:
        """[B, n, D] of latents with their padding mask."""
        tokens: Tensor = self.proj(image)
        return tokens


class Sinusoid(nn.Module):
    """Cosines and sines of the time, which is too fine for short number formats."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        """[B, D] of [B], at least float32."""
        return time_waves(timesteps, self.width)


class TimestepEmbedding(nn.Module):
    """An MLP that makes of the waves of a time what the modulations of all blocks have in common."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, waves: Tensor) -> Tensor:
        """[B, 3D] of [B, D]."""
        shared: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return shared


class Block(CheckpointedBlock):
    """Attention among tokens, attention to the caption, and an MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.width)
        self.cross_attn = Attention(config, config.text_embed_dim)
        self.mlp = MLP(config)
        self.adaln_modulation_self_attn = _modulation(config, 3)
        self.adaln_modulation_cross_attn = _modulation(config, 3)
        self.adaln_modulation_mlp = _modulation(config, 3)

    def forward(self, tokens: Tensor, context: Tensor, time: Tensor, shared: Tensor, rotation: Rotation) -> Tensor:
        """[B, n, D] of tokens of that shape."""
        shift, scale, gate = _vectors(self.adaln_modulation_self_attn(time), shared)
        normal = _normalized(tokens, shift, scale)
        tokens = tokens + gate * self.self_attn(normal, normal, rotation)
        shift, scale, gate = _vectors(self.adaln_modulation_cross_attn(time), shared)
        tokens = tokens + gate * self.cross_attn(_normalized(tokens, shift, scale), context)
        shift, scale, gate = _vectors(self.adaln_modulation_mlp(time), shared)
        out: Tensor = tokens + gate * self.mlp(_normalized(tokens, shift, scale))
        return out


class Attention(BackendAttention):
    """Attention whose queries and keys have a norm, and turn with positions where these are given."""

    def __init__(self, config: TransformerConfig, context_width: int) -> None:
        super().__init__()
        width, head = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(head, _EPS)
        self.k_proj = nn.Linear(context_width, width, bias=False)
        self.k_norm = nn.RMSNorm(head, _EPS)
        self.v_proj = nn.Linear(context_width, width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, context: Tensor, rotation: Rotation | None = None) -> Tensor:
        """What tokens [B, n, D] take from a context [B, m, D'], themselves or a caption; [B, n, D]."""
        layers = ((self.q_proj, tokens), (self.k_proj, context), (self.v_proj, context))
        query, key, value = (layer(states).unflatten(2, (self.heads, -1)) for layer, states in layers)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotated(query, rotation), rotated(key, rotation)
        out: Tensor = self.output_proj(self.mix(query, key, value))
        return out


class MLP(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layer1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.layer2 = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, n, D] of tokens of that shape."""
        out: Tensor = self.layer2(F.gelu(self.layer1(tokens)))
        return out


class FinalLayer(nn.Module):
    """Makes patches of tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.out_channels * PATCH**2, bias=False)
        self.adaln_modulation = _modulation(config, 2)

    def forward(self, tokens: Tensor, time: Tensor, shared: Tensor) -> Tensor:
        """[B, n, 2 · 2 · C] of tokens [B, n, D]."""
        shift, scale = _vectors(self.adaln_modulation(time), shared)
        out: Tensor = self.linear(_normalized(tokens, shift, scale))
        return out


def _modulation(config: TransformerConfig, vectors: int) -> nn.Sequential:
    """What makes of a time [B, D] a layer's low-rank part of as many vectors, side by side."""
    width, bottleneck = config.width, config.adaln_lora_dim
    up = nn.Linear(bottleneck, vectors * width, bias=False)
    return nn.Sequential(nn.SiLU(), nn.Linear(width, bottleneck, bias=False), up)


def _vectors(own: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and perhaps gate, [B, 1, D], of a layer's part and of what all layers have in common [B, 3D]."""
    return (own + shared[:, : own.shape[1]]).unsqueeze(1).chunk(3 * own.shape[1] // shared.shape[1], dim=2)


def rotation_of_tokens(
    config: TransformerConfig, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> Rotation:
    """The rotation of the tokens of an image, row by row, at least float32 (Su et al., 2021, arXiv:2104.09864).

    Each third of a head's channels, about, turns with the frame, which there is one of, the row and the column.
    """
    head = config.attention_head_dim
    spatial = head // 6 * 2
    dtype = torch.promote_types(dtype, torch.float32)
    rows, columns = (
        angles(torch.arange(count, device=device, dtype=dtype), spatial, _THETA * scale ** (spatial / (spatial - 2)))
        for count, scale in ((height, config.rope_scale[1]), (width, config.rope_scale[2]))
    )
    frames = rows.new_zeros(height, width, (head - 2 * spatial) // 2)
    own = [frames, rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)]
    found = torch.cat([*own, *own], dim=2).flatten(0, 1)
    return found.cos(), found.sin()


def angles(positions: Tensor, channels: int, theta: float) -> Tensor:
    """The angles of positions [n] at half as many frequencies as channels, θ^(−2i / channels); [n, channels / 2]."""
    exponents = torch.arange(0, channels, 2, device=positions.device, dtype=positions.dtype) / channels
    return positions[:, None] * theta**-exponents


def rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [B, n, heads, d] turned by their tokens' angles, channel i together with channel i + d/2."""
    cosines, sines = (own.unsqueeze(1) for own in rotation)
    exact = heads.to(cosines.dtype)
    first, second = exact.chunk(2, dim=-1)
    return (exact * cosines + torch.cat([-second, first], dim=-1) * sines).to(heads.dtype)


def _normalized(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens of mean 0 and variance 1, then scaled and shifted."""
    return F.layer_norm(tokens, tokens.shape[2:], eps=_EPS) * (1 + scale) + shift
