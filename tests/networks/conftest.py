from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit.models.interfaces import AdaptationTarget


class TinyModel(nn.Module):
    """A real stack of the layers that adapters meet: convolutions of three kinds and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, stride=2, padding=1)])
        self.out = nn.Linear(8, 6)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """[B, 3, h, w] and [B, L, 5] to [B, h·w/4, 6]."""
        hidden = torch.tanh(self.blocks[1](torch.tanh(self.blocks[0](images))))
        return self.out(hidden.flatten(2).transpose(1, 2)) + self.text(texts).mean(1, keepdim=True)

    def targets(self) -> list[AdaptationTarget]:
        """One of each kind of block."""
        return [
            AdaptationTarget(
                "lora_te_text", "text_encoder", self, "text", frozenset({"text_encoder"}), encoder_index=0
            ),
            AdaptationTarget("lora_unet_blocks_0", "unet", self, "blocks.0", frozenset({"transformer"})),
            AdaptationTarget("lora_unet_blocks_1", "unet", self, "blocks.1", frozenset({"resnet"})),
            AdaptationTarget("lora_unet_out", "unet", self, "out", frozenset({"transformer"})),
        ]


@pytest.fixture
def model() -> TinyModel:
    """The same small model in every test, frozen, as kernels may differ for layers that are trained."""
    torch.manual_seed(0)
    return TinyModel().requires_grad_(False)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """Two images and two texts for it."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 4, 5, generator=generator)
