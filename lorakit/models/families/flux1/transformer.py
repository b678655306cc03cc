"""The transformer of FLUX.1 (Black Forest Labs, 2024) and Chroma (Rock, 2025), in plain PyTorch.

Its tensors and layers have the names of the original code, by which LoRA files have them; queries, keys and values are
one layer. Double blocks have weights for text and image each, single blocks the same for both. All blocks scale and
shift tokens by vectors, modulation, which FLUX.1 computes in each block from time, guidance and the pooled caption.
In Chroma one small network computes those of all blocks from time alone.

B images, C latent channels, h and w latent sides, L = hw/4 image tokens, n text tokens, D channels of a token, d
channels of a head, k modulation vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.families.flow.layers import BackendAttention, rotate_pairs, time_waves
from lorakit.models.families.flux1.settings import MLP_RATIO, TIME_CHANNELS, VECTORS, FluxSettings
from lorakit.models.memory.activation_checkpointing import CheckpointedBlock

_EPS = 1e-6
_THETA = 10000


class FluxTransformer(nn.Module):
    """Predicts from noisy latents, their timestep and a caption the velocity ε − x₀."""

    def __init__(self, settings: FluxSettings) -> None:
        super().__init__()
        self.settings = settings
        width = settings.width
        self.img_in = nn.Linear(settings.in_channels, width)
        self.txt_in = nn.Linear(settings.joint_attention_dim, width)
        self.time_in = self.vector_in = self.guidance_in = self.distilled_guidance_layer = None
        if settings.is_chroma:
            self.distilled_guidance_layer = Approximator(settings)
        else:
            self.time_in = MLPEmbedder(TIME_CHANNELS, width)
            self.vector_in = MLPEmbedder(settings.pooled_projection_dim, width)
            if settings.guidance_embeds:
                self.guidance_in = MLPEmbedder(TIME_CHANNELS, width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(settings) for _ in range(settings.num_layers))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(settings) for _ in range(settings.num_single_layers))
        self.final_layer = LastLayer(settings)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity [B, C, h, w] of noisy latents of that shape, timesteps [B] and text [B, n, channels].

        FLUX.1 takes the pooled caption [B, channels], too, and, where the model has it, the guidance scale [B].
        Timesteps and guidance are 1000 times their values, float32. `text_mask` [B, n] is false for text that no token
        sees.
        """
        vectors = self._vectors(timesteps, pooled, guidance, latents.dtype)
        image, text = self.img_in(pack(latents)), self.txt_in(text)
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        rotation = rotations(text.shape[1], height, width, self.settings.axes_dims_rope, latents.device)
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask.bool(), (0, image.shape[1]), value=True)
        for number, block in enumerate(self.double_blocks):
            image, text = block(image, text, self._of_double(vectors, number), rotation, mask)
        tokens, count = torch.cat([text, image], dim=1), text.shape[1]
        for number, block in enumerate(self.single_blocks):
            tokens = block(tokens, self._of_single(vectors, number), rotation, mask)
        out = self.final_layer(
            tokens[:, count:], vectors[:, -VECTORS["final"] :] if self.settings.is_chroma else vectors
        )
        return unpack(out, height, width)

    def _vectors(self, timesteps: Tensor, pooled: Tensor | None, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What modulation comes from: one vector [B, D] in FLUX.1, all modulation vectors [B, k, D] in Chroma."""
        if self.distilled_guidance_layer is not None:
            # No layer of it is ever adapted, so nothing needs its gradients.
            with torch.no_grad():
                found: Tensor = self.distilled_guidance_layer(timesteps, dtype)
            return found
        assert self.time_in is not None and self.vector_in is not None  # noqa: S101, PT018 - either this or the above
        if pooled is None:
            raise ValueError("FLUX.1 needs the pooled caption")
        vector: Tensor = self.time_in(time_waves(timesteps, TIME_CHANNELS).to(dtype)) + self.vector_in(pooled)
        if self.guidance_in is None:
            return vector
        if guidance is None:
            raise ValueError("this model needs the guidance scale")
        scale: Tensor = self.guidance_in(time_waves(guidance, TIME_CHANNELS).to(dtype))
        return vector + scale

    def _of_double(self, vectors: Tensor, number: int) -> Tensor:
        """The modulation vectors of a double block, those for the image first; what they come from in FLUX.1."""
        if not self.settings.is_chroma:
            return vectors
        # All single blocks come first, then the image's side of all double blocks, then the text's.
        count = VECTORS["double"]
        image = VECTORS["single"] * self.settings.num_single_layers + count * number
        text = image + count * self.settings.num_layers
        return torch.cat([vectors[:, image : image + count], vectors[:, text : text + count]], dim=1)

    def _of_single(self, vectors: Tensor, number: int) -> Tensor:
        """The modulation vectors of a single block; what they come from in FLUX.1."""
        count = VECTORS["single"]
        return vectors[:, count * number : count * (number + 1)] if self.settings.is_chroma else vectors


class DoubleStreamBlock(CheckpointedBlock, BackendAttention):
    """Attention over text and image together; everything else with weights of their own."""

    def __init__(self, settings: FluxSettings) -> None:
        super().__init__()
        self.img_mod = None if settings.is_chroma else Modulation(settings.width, VECTORS["double"])
        self.img_attn = SelfAttention(settings)
        self.img_mlp = _mlp(settings.width)
        self.txt_mod = None if settings.is_chroma else Modulation(settings.width, VECTORS["double"])
        self.txt_attn = SelfAttention(settings)
        self.txt_mlp = _mlp(settings.width)

    def forward(
        self, image: Tensor, text: Tensor, vectors: Tensor, rotation: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Image [B, L, D] and text [B, n, D]; `vectors` are [B, D], or the modulation itself, [B, 12, D]."""
        of_image, of_text = _modulation(vectors, self.img_mod, self.txt_mod)
        heads = [
            own.heads(modulated(tokens, shift, scale))
            for own, tokens, (shift, scale, *_) in ((self.txt_attn, text, of_text), (self.img_attn, image, of_image))
        ]
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(*heads, strict=True))
        mixed = self.mix(rotate_pairs(query, rotation), rotate_pairs(key, rotation), value, mask)
        count = text.shape[1]
        from_text, from_image = mixed[:, :count], mixed[:, count:]
        image = image + of_image[2] * self.img_attn.proj(from_image)
        image = image + of_image[5] * self.img_mlp(modulated(image, of_image[3], of_image[4]))
        text = text + of_text[2] * self.txt_attn.proj(from_text)
        text = text + of_text[5] * self.txt_mlp(modulated(text, of_text[3], of_text[4]))
        return image, text


class SingleStreamBlock(CheckpointedBlock, BackendAttention):
    """Attention and MLP side by side, each a part of the same two layers."""

    def __init__(self, settings: FluxSettings) -> None:
        super().__init__()
        width = settings.width
        self.num_heads = settings.num_attention_heads
        self.linear1 = nn.Linear(width, (3 + MLP_RATIO) * width)
        self.linear2 = nn.Linear((1 + MLP_RATIO) * width, width)
        self.norm = QKNorm(settings.attention_head_dim)
        self.modulation = None if settings.is_chroma else Modulation(width, VECTORS["single"])

    def forward(self, tokens: Tensor, vectors: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Text and image, [B, n + L, D]; `vectors` are [B, D], or the modulation itself, [B, 3, D]."""
        ((shift, scale, gate),) = _modulation(vectors, self.modulation)
        width = tokens.shape[2]
        qkv, hidden = self.linear1(modulated(tokens, shift, scale)).split([3 * width, MLP_RATIO * width], dim=2)
        query, key, value = _heads(qkv, self.num_heads, self.norm)
        mixed = self.mix(rotate_pairs(query, rotation), rotate_pairs(key, rotation), value, mask)
        mixed = torch.cat([mixed, F.gelu(hidden, approximate="tanh")], dim=2)
        out: Tensor = tokens + gate * self.linear2(mixed)
        return out


class SelfAttention(nn.Module):
    """The projections of one stream of a double block."""

    def __init__(self, settings: FluxSettings) -> None:
        super().__init__()
        self.num_heads = settings.num_attention_heads
        self.qkv = nn.Linear(settings.width, 3 * settings.width)
        self.norm = QKNorm(settings.attention_head_dim)
        self.proj = nn.Linear(settings.width, settings.width)

    def heads(self, tokens: Tensor) -> list[Tensor]:
        """Queries, keys and values, each [B, tokens, heads, d]."""
        return _heads(self.qkv(tokens), self.num_heads, self.norm)


class QKNorm(nn.Module):
    """Normalizes queries and keys, each head alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(width)
        self.key_norm = RMSNorm(width)


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, and multiplies by learnt scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[…, channels]."""
        return F.rms_norm(tokens, self.scale.shape, self.scale, _EPS)


class Modulation(nn.Module):
    """Modulation vectors of one stream of one block."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> Tensor:
        """[B, count, D] of [B, D]."""
        found: Tensor = self.lin(F.silu(vector)).unflatten(1, (self.count, -1))
        return found


class MLPEmbedder(nn.Module):
    """Embeds a vector by two layers."""

    def __init__(self, inputs: int, width: int, outputs: int | None = None) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, width)
        self.out_layer = nn.Linear(width, outputs or width)

    def forward(self, vector: Tensor) -> Tensor:
        """[…, outputs]."""
        out: Tensor = self.out_layer(F.silu(self.in_layer(vector)))
        return out


class Approximator(nn.Module):
    """All of Chroma's modulation vectors, from the time and the number of each vector."""

    def __init__(self, settings: FluxSettings) -> None:
        super().__init__()
        self.channels, self.vectors = settings.approximator_num_channels, settings.vectors
        hidden = settings.approximator_hidden_dim
        self.in_proj = nn.Linear(self.channels, hidden)
        self.layers = nn.ModuleList(MLPEmbedder(hidden, hidden) for _ in range(settings.approximator_layers))
        self.norms = nn.ModuleList(RMSNorm(hidden) for _ in range(settings.approximator_layers))
        self.out_proj = nn.Linear(hidden, settings.width)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, k, D] of timesteps [B]; the guidance scale, which is an input as well, is always 0."""
        times = time_waves(timesteps, self.channels // 4)
        by_image = torch.cat([times, time_waves(torch.zeros_like(timesteps), self.channels // 4)], dim=1)
        numbers = torch.arange(self.vectors, device=timesteps.device)
        by_vector = time_waves(numbers * 1000, self.channels // 2)
        pairs = by_image.unsqueeze(1).expand(-1, self.vectors, -1), by_vector.expand(len(timesteps), -1, -1)
        vectors: Tensor = self.in_proj(torch.cat(pairs, dim=2).to(dtype))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            vectors = vectors + layer(norm(vectors))
        out: Tensor = self.out_proj(vectors)
        return out


class LastLayer(nn.Module):
    """From image tokens to their patches."""

    def __init__(self, settings: FluxSettings) -> None:
        super().__init__()
        self.linear = nn.Linear(settings.width, settings.patch_channels)
        self.adaLN_modulation = (
            None
            if settings.is_chroma
            else nn.Sequential(nn.SiLU(), nn.Linear(settings.width, VECTORS["final"] * settings.width))
        )

    def forward(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        """[B, L, channels of a patch]; `vectors` are [B, D], or the modulation itself, [B, 2, D]."""
        if self.adaLN_modulation is not None:
            vectors = self.adaLN_modulation(vectors).unflatten(1, (VECTORS["final"], -1))
        shift, scale = vectors.unsqueeze(2).unbind(1)
        out: Tensor = self.linear(modulated(tokens, shift, scale))
        return out


def pack(latents: Tensor) -> Tensor:
    """Patches of 2 × 2, row by row: [B, h/2·w/2, 4·C] of [B, C, h, w], channels by latent channel, row, column."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse, for `height` × `width` patches."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height, width), 2)


def rotations(text: int, height: int, width: int, axes: Sequence[int], device: torch.device) -> Tensor:
    """The rotations of `text` tokens, all at position 0, and of `height` × `width` patches at (0, row, column).

    Cosines and sines, float32 [1, n + L, d/2, 2].
    """
    exact = torch.float32 if device.type == "mps" else torch.float64
    rows = torch.arange(height, dtype=exact, device=device).repeat_interleave(width)
    columns = torch.arange(width, dtype=exact, device=device).repeat(height)
    angles = [
        F.pad(positions, (text, 0)).unsqueeze(1)
        * _THETA ** (-torch.arange(0, channels, 2, dtype=exact, device=device) / channels)
        for positions, channels in zip((torch.zeros_like(rows), rows, columns), axes, strict=True)
    ]
    joined = torch.cat(angles, dim=1)
    return torch.stack([joined.cos(), joined.sin()], dim=2).float().unsqueeze(0)


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalized tokens [B, n, D], scaled and shifted by vectors [B, 1, D]."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=_EPS) * (1 + scale) + shift


def _modulation(vectors: Tensor, *own: Modulation | None) -> list[Sequence[Tensor]]:
    """The vectors [B, 1, D] of each stream, from its own layer, or where there is none from those given."""
    computed = [vectors] if own[0] is None else [layer(vectors) for layer in own if layer is not None]
    streams = torch.cat(computed, dim=1).unsqueeze(2).chunk(len(own), dim=1)
    return [stream.unbind(1) for stream in streams]


def _heads(qkv: Tensor, count: int, norm: QKNorm) -> list[Tensor]:
    """Queries, keys and values, each [B, tokens, heads, d], of [B, tokens, 3·D]; the first two normalized."""
    query, key, value = qkv.view(*qkv.shape[:2], 3, count, -1).unbind(2)
    return [norm.query_norm(query), norm.key_norm(key), value]


def _mlp(width: int) -> nn.Sequential:
    hidden = MLP_RATIO * width
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
