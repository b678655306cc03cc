"""The adapter between Anima's text encoder and its transformer: ids of T5's tokens ask, states of Qwen3 answer.

Its tensors and layers have the names that they have in the original code, which are diffusers' as well.

B captions, m tokens by T5's tokenizer, k tokens by the text encoder's, D channels in blocks, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.families.anima.structure import TEXT_LENGTH, ConditionerConfig
from lorakit.models.families.anima.transformer import Rotation, angles, rotated
from lorakit.models.families.flow.layers import BackendAttention
from lorakit.models.memory.activation_checkpointing import CheckpointedBlock

_EPS = 1e-6
_THETA = 10000.0


class LLMAdapter(nn.Module):
    """Makes of the text encoder's states what the transformer attends to."""

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        self.head = config.model_dim // config.num_attention_heads
        self.embed = nn.Embedding(config.target_vocab_size, config.target_dim)
        widths = config.target_dim, config.model_dim
        self.in_proj = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths)
        self.blocks = nn.ModuleList(AdapterBlock(config) for _ in range(config.num_layers))
        self.out_proj = nn.Linear(config.model_dim, config.target_dim)
        self.norm = nn.RMSNorm(config.target_dim, _EPS)

    def forward(self, states: Tensor, state_mask: Tensor, ids: Tensor, id_mask: Tensor) -> Tensor:
        """Captions for the transformer, of at least 512 rows, zero behind each end; [B, max(m, 512), channels].

        Of the text encoder's states [B, k, channels] and T5's token ids [B, m]; masks are bool and false for padding.
        Each caption needs a token on both sides.
        """
        tokens = self.in_proj(self.embed(ids).to(states.dtype))
        rotations = self._rotation(tokens), self._rotation(states)
        for block in self.blocks:
            tokens = block(tokens, states, (id_mask, state_mask), rotations)
        found: Tensor = self.norm(self.out_proj(tokens)) * id_mask.unsqueeze(2)
        return F.pad(found, (0, 0, 0, max(TEXT_LENGTH - found.shape[1], 0)))

    def _rotation(self, tokens: Tensor) -> Rotation:
        """How the heads of tokens [B, n, …] are turned by their positions, counted from 0."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=dtype)
        found = angles(positions, self.head, _THETA).repeat(1, 2)
        return found.cos(), found.sin()


class AdapterBlock(CheckpointedBlock):
    """Attention among tokens, attention to the text encoder's states, and an MLP."""

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        width, hidden = config.model_dim, config.mlp_width
        self.norm_self_attn = nn.RMSNorm(width, _EPS)
        self.self_attn = AdapterAttention(width, width, config.num_attention_heads)
        self.norm_cross_attn = nn.RMSNorm(width, _EPS)
        self.cross_attn = AdapterAttention(width, config.source_dim, config.num_attention_heads)
        self.norm_mlp = nn.RMSNorm(width, _EPS)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, tokens: Tensor, states: Tensor, masks: tuple[Tensor, Tensor], rotations: tuple[Rotation, Rotation]
    ) -> Tensor:
        """[B, m, D] of tokens of that shape; masks and rotations of tokens and of the text encoder's states."""
        own, other = zip(masks, rotations, strict=True)
        normal = self.norm_self_attn(tokens)
        tokens = tokens + self.self_attn(normal, normal, own[1], own)
        tokens = tokens + self.cross_attn(self.norm_cross_attn(tokens), states, own[1], other)
        out: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return out


class AdapterAttention(BackendAttention):
    """Attention whose queries and keys turn with their own positions."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads, _EPS)
        self.k_proj = nn.Linear(context_width, width, bias=False)
        self.k_norm = nn.RMSNorm(width // heads, _EPS)
        self.v_proj = nn.Linear(context_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, context: Tensor, rotation: Rotation, other: tuple[Tensor, Rotation]) -> Tensor:
        """What tokens [B, m, D] take from a context, whose mask and rotation is `other`; [B, m, D]."""
        layers = ((self.q_proj, tokens), (self.k_proj, context), (self.v_proj, context))
        query, key, value = (layer(states).unflatten(2, (self.heads, -1)) for layer, states in layers)
        mask, turn = other
        query, key = rotated(self.q_norm(query), rotation), rotated(self.k_norm(key), turn)
        out: Tensor = self.o_proj(self.mix(query, key, value, mask))
        return out
