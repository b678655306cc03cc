"""ResNet blocks and the layers that change an image's size.

B images, h and w sides of the image, T channels of the time embedding.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.memory.activation_checkpointing import CheckpointedBlock


class ResnetBlock2D(CheckpointedBlock):
    """Two convolutions beside a shortcut, the time added between them (He et al., 2016; Ho et al., 2020)."""

    def __init__(self, inputs: int, outputs: int, time_channels: int, groups: int = 32, eps: float = 1e-5) -> None:
        """From `inputs` to `outputs` channels, normalised in so many groups."""
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
