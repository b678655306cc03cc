"""Models for tests and benchmarks: real enough for every tool, and the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from lorakit.models.weights.load import without_weights
from lorakit.testing.models import FULL_SD1, FULL_SD2, TINY_SD1, Settings, make_folder, make_tiny_sd1, to_single_file
from tests.models.building import stable_diffusion


@pytest.mark.parametrize("folder", ["tiny_sd1", "tiny_sd2"])
def test_diffusers_draws_with_the_tiny_model(request: pytest.FixtureRequest, folder: str) -> None:
    """The folder loads as a pipeline of diffusers, which makes a finite image of the right size."""
    pipeline = StableDiffusionPipeline.from_pretrained(request.getfixturevalue(folder), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=2, height=64, width=48, output_type="pt").images
    assert image.shape == (1, 3, 64, 48)
    assert image.isfinite().all()


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    """The same seed gives the same file, another seed another one."""
    files = [
        to_single_file(make_tiny_sd1(tmp_path / str(index), seed), tmp_path / f"{index}.safetensors").read_bytes()
        for index, seed in enumerate((1, 1, 2))
    ]
    assert files[0] == files[1] != files[2]


def test_number_format_of_the_files(tmp_path: Path) -> None:
    """A folder can be written in half precision."""
    folder = make_folder(tmp_path, TINY_SD1, dtype="float16")
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_predictions_have_the_power_of_a_trained_models(tiny_sd1: Path) -> None:
    """Against noise, a random model's loss is near 1: its output is finite and small."""
    model = stable_diffusion(tiny_sd1)
    noise = torch.randn(4, 4, 8, 8)
    states = model.text_encoder.encode(model.text_encoder.tokenize(["a cat"] * 4))
    loss = (model.predict(noise, torch.tensor([1, 300, 600, 999]), states) - noise).square().mean()
    assert 0.7 < loss < 1.3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (FULL_SD1, [859_520_964, 83_653_863, 123_060_480]),
        (FULL_SD2, [865_910_724, 83_653_863, 340_387_840]),
    ],
    ids=["1.5", "2.1"],
)
def test_full_size_is_that_of_the_published_models(settings: Settings, expected: list[int]) -> None:
    """The full-size settings have the parameter counts of Stable Diffusion 1.5 and 2.1."""
    unet = without_weights(lambda: UNet2DConditionModel(**settings["unet"]))
    vae = without_weights(lambda: AutoencoderKL(**settings["vae"]))
    text = without_weights(lambda: CLIPTextModel(CLIPTextConfig(**settings["text_encoder"])))
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (unet, vae, text)]
    assert counts == expected
