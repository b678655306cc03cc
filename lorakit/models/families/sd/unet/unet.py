"""The U-Net: latents get smaller and smaller, and larger again.

B images, C latent channels, h and w latent sides, m tokens of c' channels of the caption.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.families.sd.unet.blocks import DownBlock, MidBlock, UpBlock
from lorakit.models.families.sd.unet_config import UNetConfig

_LONGEST_PERIOD = 10000


class UNet(nn.Module):
    """Predicts from noisy latents, their timestep and a caption what the noise process asks for."""

    def __init__(self, settings: UNetConfig) -> None:
        super().__init__()
        self.settings = settings
        levels = settings.levels
        top, bottom = levels[0], levels[-1]
        self.conv_in = nn.Conv2d(settings.in_channels, top.channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(top.channels, settings.time_channels)
        self.down_blocks = nn.ModuleList(DownBlock(settings, level) for level in levels)
        self.up_blocks = nn.ModuleList(UpBlock(settings, level) for level in reversed(levels))
        self.mid_block = MidBlock(settings, bottom) if settings.mid_block_type else None
        self.conv_norm_out = nn.GroupNorm(settings.norm_num_groups, top.channels, settings.norm_eps)
        self.conv_out = nn.Conv2d(top.channels, settings.out_channels, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[B, C, h, w] of noisy latents of that shape, timesteps [B] and captions [B, m, c']."""
        temb = self._embedded(timesteps, latents.dtype)
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

    def _embedded(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """SiLU of the time embedding [B, T], which all ResNet blocks begin with."""
        settings = self.settings
        waves = timestep_embedding(
            timesteps, settings.block_out_channels[0], settings.flip_sin_to_cos, settings.freq_shift
        )
        return F.silu(self.time_embedding(waves.to(dtype)))


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
    exponents = -math.log(_LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float().unsqueeze(1) * (exponents / (half - shift)).exp()
    waves = (angles.cos(), angles.sin()) if cosines_first else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=1)
