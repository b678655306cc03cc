"""The U-Net of Stable Diffusion (Rombach et al., 2022, arXiv:2112.10752), SDXL included, in plain PyTorch.

Its tensors and layers have the names that they have in diffusers, and so have its classes: LoRA files are written by
the ones, and modules for other trainers find the layers that they adapt by the others.

B images, C latent channels, h and w the sides of latents or of the image at a level, c its channels there and n = h·w
its tokens, T channels of the time embedding, m tokens of c' channels of the caption, p channels of the pooled one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import zip_longest
from operator import add

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.families.sd.unet_config import Level, UNetConfig
from lorakit.models.interfaces import AttentionBackend
from lorakit.models.memory.activation_checkpointing import CheckpointedBlock
from lorakit.models.memory.channels_last import memory_format_of

_UPCAST_DEVICES = ("mps",)
"""Where a model that wants its scores in float32 needs longer queries and keys for it: other devices' kernels compute
scores in float32 by themselves, and so does attention that is written out."""


class UNet(nn.Module):
    """Predicts from noisy latents, their timestep and a caption what the noise process asks for."""

    def __init__(self, settings: UNetConfig) -> None:
        super().__init__()
        self.settings = settings
        levels = settings.levels
        top, bottom = levels[0], levels[-1]
        self.conv_in = nn.Conv2d(settings.in_channels, top.channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(top.channels, settings.time_channels)
        added = settings.added_channels
        self.add_embedding = TimestepEmbedding(added, settings.time_channels) if added else None
        self.down_blocks = nn.ModuleList(DownBlock(settings, level) for level in levels)
        self.up_blocks = nn.ModuleList(UpBlock(settings, level) for level in reversed(levels))
        self.mid_block = MidBlock(settings, bottom) if settings.mid_block_type else None
        self.conv_norm_out = nn.GroupNorm(settings.norm_num_groups, top.channels, settings.norm_eps)
        self.conv_out = nn.Conv2d(top.channels, settings.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """[B, C, h, w] of noisy latents of that shape, timesteps [B] and captions [B, m, c'].

        SDXL takes the pooled captions [B, p] and, in full precision, sizes [B, 6], too.
        """
        settings = self.settings
        waves = timestep_embedding(
            timesteps, settings.block_out_channels[0], settings.flip_sin_to_cos, settings.freq_shift
        )
        temb = self.time_embedding(waves.to(latents.dtype))
        if self.add_embedding is not None and text_embeds is not None and time_ids is not None:
            sizes = timestep_embedding(time_ids.flatten(), settings.addition_time_embed_dim or 256).view(
                len(time_ids), -1
            )
            temb = temb + self.add_embedding(torch.cat([text_embeds, sizes.to(latents.dtype)], dim=1))
        temb = F.silu(temb)  # [B, T], which all ResNet blocks begin with
        skips = [self.conv_in(latents)]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, encoder_hidden_states)
        hidden_states = skips[-1]
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, temb, encoder_hidden_states)
        for block in self.up_blocks:
            hidden_states = block(hidden_states, skips, temb, encoder_hidden_states)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))
        return out


class TimestepEmbedding(nn.Module):
    """An MLP that makes of the waves of a timestep what ResNet blocks read of it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, waves: Tensor) -> Tensor:
        """[B, outputs] of [B, inputs]."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return out


def timestep_embedding(timesteps: Tensor, count: int, cosines_first: bool = True, shift: float = 0) -> Tensor:
    """Cosines and sines of timesteps [B], or sines and cosines, at count/2 frequencies; float32 [B, count].

    Frequency number i is 10000^(−i / (count/2 − shift)) (Vaswani et al., 2017, arXiv:1706.03762).
    """
    half = count // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float().unsqueeze(1) * (exponents / (half - shift)).exp()
    waves = (angles.cos(), angles.sin()) if cosines_first else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=1)


class DownBlock(nn.Module):
    """ResNet blocks, a transformer behind each if the level has any; then the image is halved."""

    def __init__(self, settings: UNetConfig, level: Level) -> None:
        super().__init__()
        widths = [level.above, *[level.channels] * (level.layers - 1)]
        self.attentions = _transformers(settings, level, level.layers if level.attends_down else 0)
        self.resnets = _resnets(settings, level, widths)
        self.downsamplers = nn.ModuleList([] if level.is_bottom else [Downsample2D(level.channels)])

    def forward(self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor) -> list[Tensor]:
        """What each layer makes of the image of the level above: [B, c, h, w], at last halved."""
        found = []
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            hidden_states = resnet(hidden_states, temb)
            if transformer is not None:
                hidden_states = transformer(hidden_states, encoder_hidden_states)
            found.append(hidden_states)
        return [*found, *(downsampler(hidden_states) for downsampler in self.downsamplers)]


class MidBlock(nn.Module):
    """A transformer between two ResNet blocks."""

    def __init__(self, settings: UNetConfig, level: Level) -> None:
        super().__init__()
        self.attentions = _transformers(settings, level, 1)
        self.resnets = _resnets(settings, level, [level.channels] * 2)

    def forward(self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[B, c, h, w] of an image of that shape."""
        first, second = self.resnets
        (transformer,) = self.attentions
        out: Tensor = second(transformer(first(hidden_states, temb), encoder_hidden_states), temb)
        return out


class UpBlock(nn.Module):
    """Like a level on the way down, but each ResNet block also sees what a layer made of the image there."""

    def __init__(self, settings: UNetConfig, level: Level) -> None:
        super().__init__()
        own = [level.channels] * level.layers
        widths = map(add, [level.below, *own], [*own, level.above])
        self.attentions = _transformers(settings, level, level.layers + 1 if level.attends_up else 0)
        self.resnets = _resnets(settings, level, widths)
        self.upsamplers = nn.ModuleList([] if level.is_top else [Upsample2D(level.channels)])

    def forward(
        self, hidden_states: Tensor, skips: list[Tensor], temb: Tensor, encoder_hidden_states: Tensor
    ) -> Tensor:
        """[B, c, h, w] of an image, enlarged to the size that the way down had; takes what it uses off `skips`."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            hidden_states = resnet(torch.cat([hidden_states, skips.pop()], dim=1), temb)
            if transformer is not None:
                hidden_states = transformer(hidden_states, encoder_hidden_states)
        for upsampler in self.upsamplers:
            hidden_states = upsampler(hidden_states, like=skips[-1])
        return hidden_states


def _transformers(settings: UNetConfig, level: Level, count: int) -> nn.ModuleList:
    return nn.ModuleList(Transformer2DModel(settings, level) for _ in range(count))


def _resnets(settings: UNetConfig, level: Level, widths: Iterable[int]) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock2D(width, level.channels, settings.time_channels, settings.norm_num_groups, settings.norm_eps)
        for width in widths
    )


class ResnetBlock2D(CheckpointedBlock):
    """Two convolutions beside a shortcut, the time added between them (He et al., 2016; Ho et al., 2020)."""

    def __init__(self, inputs: int, outputs: int, time_channels: int, groups: int = 32, eps: float = 1e-5) -> None:
        """From `inputs` to `outputs` channels, normalised in `groups` groups."""
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """[B, outputs, h, w] of an image [B, inputs, h, w] and SiLU of the time embedding [B, T]."""
        hidden: Tensor = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden = hidden + self.time_emb_proj(temb)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = self.conv_shortcut(hidden_states) + hidden
        return out


class Downsample2D(nn.Module):
    """Halves the sides of an image, rounding up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, c, ⌈h/2⌉, ⌈w/2⌉] of [B, c, h, w]."""
        out: Tensor = self.conv(hidden_states)
        return out


class Upsample2D(nn.Module):
    """Enlarges an image to a size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor, like: Tensor) -> Tensor:
        """The image [B, c, h', w'] with the sides of another one, [B, c, h, w]."""
        out: Tensor = self.conv(F.interpolate(hidden_states, size=like.shape[2:], mode="nearest"))
        return out


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
        shape, memory_format = hidden_states.shape, memory_format_of(hidden_states)
        image: Tensor = self.norm(hidden_states)
        if not self.projects_tokens:
            image = self.proj_in(image)
        tokens = image.flatten(2).transpose(1, 2)  # [B, n, c]
        if self.projects_tokens:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states)
        if self.projects_tokens:
            tokens = self.proj_out(tokens)
        image = tokens.transpose(1, 2).reshape(shape).contiguous(memory_format=memory_format)
        return (image if self.projects_tokens else self.proj_out(image)) + hidden_states


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


class Attention(nn.Module):
    """Projects queries, keys and values, and leaves the rest to an attention backend."""

    def __init__(self, channels: int, context_channels: int, heads: int, upcasts: bool = False) -> None:
        """From tokens with `channels` channels to others with `context_channels`.

        With `upcasts` the scores, as of a model that overflows float16, must be computed in float32. Raises ValueError
        where the heads do not share the channels evenly.
        """
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared by {heads} attention heads")
        self.heads = heads
        self.upcasts = upcasts
        self.backend: AttentionBackend = F.scaled_dot_product_attention
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
        if self.upcasts and heads.device.type in _UPCAST_DEVICES:
            return heads.to(torch.promote_types(heads.dtype, torch.float32))
        return heads


def use_backend(unet: nn.Module, backend: AttentionBackend) -> None:
    """Let a backend compute all attention of a U-Net."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.backend = backend
