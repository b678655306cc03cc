"""Files are read by diffusers, and mean there what they mean here."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit.api.components import SaverConfig
from lorakit.builtin.networks import C3LierConfig, LierlaConfig
from lorakit.builtin.savers import CkptConfig, SafetensorsConfig
from lorakit.models.families.sd.targets import text_encoder_targets, unet_targets
from lorakit.networks.adapter_file import AdapterFile
from lorakit.networks.config import LoRAConfig
from lorakit.testing.models import TINY_SD1

Parts = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def parts() -> Parts:
    """U-Net and text encoder of a small Stable Diffusion 1.x with random weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(**TINY_SD1["text_encoder"]))
    return UNet2DConditionModel(**TINY_SD1["unet"]).eval(), text.eval()


@torch.no_grad()
def outputs(unet: nn.Module, text_encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """Noise prediction and text states for a fixed input."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(49000, (1, 77), generator=generator)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    states = text_encoder(tokens).last_hidden_state
    return unet(latents, torch.tensor([500]), states).sample, states


@pytest.mark.parametrize(
    "network", [LierlaConfig(rank=4), C3LierConfig(rank=8, alpha=4.0, conv_rank=4, conv_alpha=2.0)]
)
@pytest.mark.parametrize("saver", [SafetensorsConfig(precision="fp16"), CkptConfig()])
def test_diffusers_computes_the_same(parts: Parts, network: LoRAConfig, saver: SaverConfig, tmp_path: Path) -> None:
    """A pipeline of diffusers with the file loaded gives the U-Net and text outputs of the model that was trained."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    unet, text_encoder = deepcopy(parts)
    before = outputs(unet, text_encoder)
    adapters = network.build([*text_encoder_targets(text_encoder), *unet_targets(unet)])
    for part in adapters.parts:
        for parameter in adapters.parameters_of(part):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    trained = outputs(unet, text_encoder)
    path = tmp_path / f"lora{saver.build().suffix}"
    saver.build().save(AdapterFile(adapters.adapter_state(), {"ss_network_dim": "4"}), path)

    unet, text_encoder = deepcopy(parts)
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=unet,
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    for theirs, ours, base in zip(outputs(pipeline.unet, pipeline.text_encoder), trained, before, strict=True):
        change = (ours - base).norm()
        assert change / base.norm() > 0.05
        assert (theirs - ours).norm() < 2e-3 * change
