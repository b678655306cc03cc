"""The tensors that a part should have, told from its settings: those of the modules, name by name."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from lorakit.models.families.sd.checkpoint import FORMATS
from lorakit.models.families.sd.structure import clip_shapes, unet_shapes, vae_shapes
from lorakit.models.families.sd.text_encoder import clip_module
from lorakit.models.families.sd.unet import UNet
from lorakit.models.families.sd.unet_config import UNetConfig
from lorakit.models.weights.checkpoint import CheckpointPart
from lorakit.models.weights.load import shapes_of, without_weights
from lorakit.testing.models import FULL_SD1, FULL_SD2, TINY_SD1, TINY_SD2

MODELS = [TINY_SD1, TINY_SD2, FULL_SD1, FULL_SD2]
NAMES = ["tiny 1.x", "tiny 2.x", "1.5", "2.1"]
UNETS: list[dict[str, Any]] = [
    *(model["unet"] for model in MODELS),
    {},
    {"mid_block_type": None},
    {"layers_per_block": [1, 2, 3, 1], "transformer_layers_per_block": [1, 2, 1, 3]},
    {"cross_attention_dim": [8, 16, 24, 32], "use_linear_projection": True, "in_channels": 9, "out_channels": 5},
    {"block_out_channels": [32], "down_block_types": ["DownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]},
]
VAES: list[dict[str, Any]] = [
    *(model["vae"] for model in MODELS),
    {},
    {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "mid_block_add_attention": False},
    {"in_channels": 1, "out_channels": 2, "block_out_channels": [32, 32, 64], "layers_per_block": 3}
    | {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
]


@pytest.mark.parametrize("settings", UNETS)
def test_tensors_of_unets(settings: dict[str, Any]) -> None:
    """Every name and shape of the U-Net's module, and no other."""
    module = without_weights(lambda: UNet(UNetConfig.of(settings)))
    assert unet_shapes(settings) == shapes_of(module)


@pytest.mark.parametrize("settings", VAES)
def test_tensors_of_vaes(settings: dict[str, Any]) -> None:
    """The same of the VAE's."""
    assert vae_shapes(settings) == shapes_of(without_weights(lambda: AutoencoderKL.from_config(settings)))


@pytest.mark.parametrize("settings", [{}, *(model["text_encoder"] for model in MODELS)], ids=["defaults", *NAMES])
def test_tensors_of_text_encoders(settings: dict[str, Any]) -> None:
    """The same of the text encoder's."""
    part = CheckpointPart(FORMATS["text_encoder"], Path("x"), settings, {}, {}, str)
    assert clip_shapes(settings) == shapes_of(without_weights(partial(clip_module, part)))


def test_blocks_of_other_vaes_are_refused() -> None:
    """Where tensors cannot be told, that is said."""
    with pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
        vae_shapes({"down_block_types": ["AttnDownEncoderBlock2D"]})


def test_torch_is_not_needed() -> None:
    """The names are known without torch."""
    code = (
        "import sys; from lorakit.models.families.sd.structure import unet_shapes\n"
        "assert len(unet_shapes({})) == 686\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
