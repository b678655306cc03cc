"""The adapters of a full-size Stable Diffusion 1.5, made on the meta device, where weights take no memory."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit.builtin.networks import C3LierConfig, LierlaConfig
from lorakit.models.families.sd.targets import text_encoder_targets, unet_targets
from lorakit.models.interfaces import AdaptationTarget
from lorakit.networks.config import LoRAConfig

Shapes = dict[str, tuple[int, ...]]
KEYS = Path(__file__).with_name("lora_keys_sd15.tsv")
"""Every layer that LoRA files of SD 1.x adapt: name, kind, channels, kernel, and the networks that adapt it."""


@pytest.fixture(scope="module")
def parts() -> tuple[nn.Module, nn.Module]:
    """U-Net and text encoder of SD 1.5 by their published configs, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768), CLIPTextModel(text)


@pytest.fixture
def targets(parts: tuple[nn.Module, nn.Module]) -> list[AdaptationTarget]:
    """All layers that can be adapted, text encoder first."""
    unet, text_encoder = parts
    return [*text_encoder_targets(text_encoder), *unet_targets(unet)]


def listed(config: LoRAConfig) -> Shapes:
    """The keys and shapes that a file has by the list."""
    shapes: Shapes = {}
    for row in csv.DictReader(KEYS.open(), delimiter="\t"):
        if row["mode"] != "LierLa" and not isinstance(config, C3LierConfig):
            continue
        kernel = int(row["kernel"])
        rank = config.conv_rank if kernel > 1 and isinstance(config, C3LierConfig) else config.rank
        sides, ones = ((kernel, kernel), (1, 1)) if row["kind"] == "conv" else ((), ())
        shapes[f"{row['lora_name']}.lora_down.weight"] = (rank, int(row["in"]), *sides)
        shapes[f"{row['lora_name']}.lora_up.weight"] = (int(row["out"]), rank, *ones)
        shapes[f"{row['lora_name']}.alpha"] = ()
    return shapes


@pytest.mark.parametrize(
    ("config", "modules", "parameters"),
    [
        (LierlaConfig(rank=16), 264, 2_654_208 + 6_782_976),
        (C3LierConfig(rank=16, conv_rank=8), 350, 2_654_208 + 12_461_056),
    ],
    ids=["lierla", "c3lier"],
)
def test_keys_and_shapes(targets: list[AdaptationTarget], config: LoRAConfig, modules: int, parameters: int) -> None:
    """Keys, shapes, and numbers of adapters and parameters are those of LoRA files for SD 1.x."""
    network = config.build(targets)
    shapes = {
        f"{adapter.key}.{suffix}": tuple(tensor.shape)
        for adapter in network.adapters
        for suffix, tensor in adapter.adapter_state().items()
    }
    trained = sum(p.numel() for part in network.parts for p in network.parameters_of(part))
    network.detach()
    assert shapes == listed(config)
    assert len(network.adapters) == modules
    assert trained == parameters
