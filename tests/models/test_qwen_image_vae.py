"""Qwen-Image's VAE, against diffusers' for videos."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.models.qwen_image_vae import read_qwen_image_vae_decoder, read_qwen_image_vae_encoder
from lorakit.models.qwen_image_vae_files import (
    LATENTS_MEAN,
    LATENTS_STD,
    infer_settings,
    original_name,
    qwen_image_vae_format,
    vae_shapes,
)
from lorakit.models.weights.checkpoint import CheckpointPart
from lorakit.models.weights.load import shapes_of, without_weights

TINY = {"base_dim": 8, "dim_mult": [1, 2, 3, 4], "num_res_blocks": 1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKLQwenImage:
    """A small VAE with random weights, norms included."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(**TINY).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return vae


def stored(vae: AutoencoderKLQwenImage, form: str, folder: Path) -> CheckpointPart:
    """The VAE in a folder, or in a single file with names of either layout."""
    part_format = qwen_image_vae_format("Anima")
    if form == "folder":
        vae.save_pretrained(folder / "vae")
        return part_format.alone(folder)
    rename = str if form == "diffusers names" else lambda name: original_name(name, TINY["num_res_blocks"])
    state: dict[str, Tensor] = {rename(name): tensor for name, tensor in vae.state_dict().items()}
    save_file(state, folder / "vae.safetensors")
    return part_format.alone(folder / "vae.safetensors")


@pytest.mark.parametrize("form", ["folder", "diffusers names", "original names"])
def test_it_is_that_of_diffusers(theirs: AutoencoderKLQwenImage, form: str, tmp_path: Path) -> None:
    """Modes of latents and images of them, for images that are no squares, each channel scaled."""
    part = stored(theirs, form, tmp_path)
    part.check()
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, deviation = read_qwen_image_vae_encoder(part, CPU, torch.float32).encode(images)
    shift, spread = (torch.tensor(own).view(1, -1, 1, 1, 1) for own in (LATENTS_MEAN, LATENTS_STD))
    with torch.no_grad():
        expected = (theirs.encode(images.unsqueeze(2)).latent_dist.mode() - shift) / spread
        decoded = theirs.decode(expected * spread + shift).sample
    assert mean.shape == (2, 16, 4, 6)
    torch.testing.assert_close(mean, expected.squeeze(2), rtol=1e-5, atol=1e-5)
    assert not deviation.any()
    found = read_qwen_image_vae_decoder(part, CPU, torch.float32).decode(mean)
    torch.testing.assert_close(found, decoded.squeeze(2), rtol=1e-4, atol=1e-5)


def test_what_images_do_not_need_is_not_kept(theirs: AutoencoderKLQwenImage, tmp_path: Path) -> None:
    """Weights for other frames take no memory."""
    encoder = read_qwen_image_vae_encoder(stored(theirs, "folder", tmp_path), CPU, torch.float32).module
    assert not [name for name in encoder.state_dict() if "time_conv" in name]
    assert {tuple(tensor.shape[2:]) for tensor in encoder.state_dict().values() if tensor.dim() == 5} <= {
        (1, 3, 3), (1, 1, 1),
    }  # fmt: skip


def test_names_settings_and_scale_are_those_of_the_published_model() -> None:
    """Diffusers' table for Wan's names, its module's tensors, and its defaults."""
    expected = shapes_of(without_weights(AutoencoderKLQwenImage))
    assert vae_shapes({}) == expected
    assert convert_wan_vae_to_diffusers({original_name(name, 2): name for name in expected}) == {
        name: name for name in expected
    }
    for own in (expected, {original_name(name, 2): shape for name, shape in expected.items()}):
        assert vae_shapes(infer_settings(own)) == expected
    defaults = {name: own.default for name, own in inspect.signature(AutoencoderKLQwenImage).parameters.items()}
    assert defaults["latents_mean"] == list(LATENTS_MEAN)
    assert defaults["latents_std"] == list(LATENTS_STD)
    scaled = [(1 - mean) / std for mean, std in zip(LATENTS_MEAN, LATENTS_STD, strict=True)]
    assert scaled[:2] == pytest.approx([0.623439, 1.175229], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"), [({"latents_std": [0.0] * 16}, "positive"), ({"latents_mean": [0.0]}, "not of 16 channels")]
)
def test_settings_that_make_no_sense(
    theirs: AutoencoderKLQwenImage, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A scale of nothing, or for other channels."""
    theirs.save_pretrained(tmp_path / "vae")
    part = qwen_image_vae_format("Anima").alone(tmp_path)
    with pytest.raises(ModelError, match=words):
        CheckpointPart(part.format, part.file, {**part.settings, **changes}, part.file_names, part.shapes, str).check()


def test_wan_22_is_another(tmp_path: Path) -> None:
    """A VAE with 48 latent channels."""
    state = {"encoder.conv1.weight": torch.zeros(8, 3, 3, 3, 3), "conv2.weight": torch.zeros(48, 48, 1, 1, 1)}
    save_file(state, tmp_path / "wan.safetensors")
    with pytest.raises(ModelError, match=r"wan\.safetensors"):
        qwen_image_vae_format("Anima").alone(tmp_path / "wan.safetensors")
