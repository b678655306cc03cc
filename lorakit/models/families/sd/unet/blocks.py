"""The levels of the U-Net: one for each size that the image has on its way down, and again on its way up.

B images, c and h, w the channels and sides of the image at a level, T channels of the time embedding, m tokens of c'
channels of the caption.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from operator import add

import torch
from torch import Tensor, nn

from lorakit.models.families.sd.unet.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from lorakit.models.families.sd.unet.transformer import Transformer2DModel
from lorakit.models.families.sd.unet_config import Level, UNetConfig


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
