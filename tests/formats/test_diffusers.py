"""Files that lorakit saves, in diffusers' own loader: every key used, and the mathematics the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from skimage import data as photographs_of
from skimage.io import imsave
from torch import Tensor, nn

import lorakit
from lorakit.config.load import config_from_tables
from lorakit.models.families.sd.targets import text_encoder_targets, unet_targets
from lorakit.testing.models import FULL_SD1, make_folder, make_tiny_sd1, make_tiny_sd2, to_single_file

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def write_photographs(folder: Path, count: int, side: int) -> Path:
    """Crops of the photographs that come with scikit-image, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name = NAMES[number % len(NAMES)]
        picture = getattr(photographs_of, name)()
        top, left = 8 * (number // len(NAMES)), 16 * (number // len(NAMES))
        imsave(folder / f"{number:02d}.png", picture[top : top + side, left : left + side], check_contrast=False)
        (folder / f"{number:02d}.txt").write_text(f"a photograph, {name}, number {number}")
    return folder


def trained_file(model: Path, images: Path, out: Path, /, **sections: Any) -> Path:
    """Train on a single-file model; strong enough to see, on both parts."""
    tables: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"image_dir": str(images), "resolution": 64},
        "network": {"rank": 16, "alpha": 8.0},
        "optimizer": {"lr": 1e-3},
        "training": {"max_steps": 6, "device": "cpu"},
        "output": {"dir": str(out)},
    }
    for section, values in sections.items():
        tables[section] = {**tables.get(section, {}), **values} if isinstance(values, dict) else values
    return lorakit.train(config_from_tables(tables, out))


def outputs(pipeline: Any, side: int) -> dict[str, Tensor]:
    """What the text encoder and the U-Net of a pipeline make of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    tokens = pipeline.tokenizer("a photograph of a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipeline.text_encoder(tokens).last_hidden_state
        latents = torch.randn(1, 4, side, side, generator=generator)
        text = torch.randn(hidden.shape, generator=generator)
        return {"text_encoder": hidden, "unet": pipeline.unet(latents, torch.tensor([321]), text).sample}


def merge_by_hand(pipeline: Any, tensors: dict[str, Tensor]) -> None:
    """W ← W + alpha/rank · U·D in every layer that the file names, in float64.

    Where there are magnitudes, each output's weights are then scaled to have theirs as their norm.
    """
    layers = {t.key: t.module for t in (*text_encoder_targets(pipeline.text_encoder), *unet_targets(pipeline.unet))}
    for key in {name.split(".")[0] for name in tensors}:
        layer = layers[key]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
        update = torch.einsum("or,r...->o...", up.flatten(1), down) * (tensors[f"{key}.alpha"].item() / len(down))
        weight = layer.weight.double() + update.view(layer.weight.shape)
        if f"{key}.dora_scale" in tensors:
            norms = weight.flatten(1).norm(dim=1).view_as(tensors[f"{key}.dora_scale"])
            weight *= tensors[f"{key}.dora_scale"].double() / norms
        layer.weight.data = weight.to(layer.weight.dtype)


def check(folder: Path, file: Path, side: int, caplog: pytest.LogCaptureFixture, given: Path | None = None) -> None:
    """Diffusers takes every key, and its outputs are those of the weights merged by hand.

    It is given the file, or another one that should mean the same.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.enable_propagation()
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    base = outputs(pipeline, side)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(given or file)
    assert "keys" not in caplog.text
    loaded = sum(hasattr(m, "lora_A") for part in (pipeline.unet, pipeline.text_encoder) for m in part.modules())
    assert loaded == len({name.split(".")[0] for name in tensors})
    by_diffusers = outputs(pipeline, side)
    merged = StableDiffusionPipeline.from_pretrained(folder)
    merge_by_hand(merged, tensors)
    by_hand = outputs(merged, side)
    for part, expected in by_hand.items():
        assert (expected - base[part]).norm() > 1e-3 * base[part].norm(), f"{part} was not trained enough to compare"
        assert (by_diffusers[part] - expected).norm() < 1e-5 * expected.norm(), part


@pytest.mark.parametrize("network", [{"name": "lierla"}, {"name": "c3lier", "conv_rank": 4, "conv_alpha": 2.0}])
@pytest.mark.parametrize("saver", ["safetensors", "ckpt", "pt"])
def test_tiny_model(tmp_path: Path, caplog: pytest.LogCaptureFixture, network: dict[str, Any], saver: str) -> None:
    """A LoRA for a tiny model, trained from a single file, in every format; conv_alpha differs from alpha."""
    folder = make_tiny_sd1(tmp_path / "model")
    model = to_single_file(folder, tmp_path / "model.safetensors")
    images = write_photographs(tmp_path / "images", 4, 96)
    file = trained_file(model, images, tmp_path / "out", network=network, saver={"name": saver})
    assert file.suffix == f".{saver}"
    check(folder, file, 8, caplog)


@pytest.mark.parametrize("network", [{"name": "lierla"}, {"name": "c3lier", "conv_rank": 4, "conv_alpha": 2.0}])
def test_tiny_model_of_2x(tmp_path: Path, caplog: pytest.LogCaptureFixture, network: dict[str, Any]) -> None:
    """A LoRA for a tiny Stable Diffusion 2.x that predicts velocity, from a single file; it says what it is for."""
    folder = make_tiny_sd2(tmp_path / "model", prediction="v_prediction")
    model = to_single_file(folder, tmp_path / "model.safetensors")
    images = write_photographs(tmp_path / "images", 4, 96)
    velocity = {"prediction": "v_prediction"}
    file = trained_file(model, images, tmp_path / "out", model=velocity, network=network)
    with safe_open(file, "pt") as stream:
        metadata = stream.metadata()
    assert (metadata["ss_v2"], metadata["ss_base_model_version"]) == ("True", "sd_v2_v")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert load_file(file)["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (16, 32)
    check(folder, file, 8, caplog)


VARIED: dict[str, Any] = {
    "name": "c3lier",
    "alpha": 4.0,
    "conv_alpha": 2.0,
    "rank_stabilized": True,
    "block_ranks": [1 + number % 5 for number in range(25)],
    "block_alphas": [1.0 + number % 7 for number in range(25)],
    "conv_block_ranks": [(number + 1) % 3 for number in range(25)],
    "conv_block_alphas": [1.0 + number % 2 for number in range(25)],
}
"""A network whose scale is another in nearly every block."""


def test_scales_that_vary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With scales of all kinds the file holds one alpha, and diffusers' outputs are those of the trained network."""
    folder = make_tiny_sd1(tmp_path / "model")
    images = write_photographs(tmp_path / "images", 4, 96)
    file = trained_file(folder, images, tmp_path / "out", network=VARIED, output={"save_state": True})
    tensors = load_file(file)
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith("alpha")} == {4.0}
    check(folder, file, 8, caplog)
    (state,) = (tmp_path / "out").glob("*-state/step*/network.safetensors")
    exact = load_file(state)
    assert exact.keys() == tensors.keys()
    scales = set()
    for name in (name.removesuffix(".alpha") for name in exact if name.endswith(".alpha")):
        rank = len(exact[f"{name}.lora_down.weight"])
        trained, written = (own[f"{name}.alpha"].item() / rank for own in (exact, tensors))
        scales.add(round(trained, 6))
        assert torch.equal(exact[f"{name}.lora_down.weight"], tensors[f"{name}.lora_down.weight"])
        up = tensors[f"{name}.lora_up.weight"].double() * written
        assert torch.allclose(up, exact[f"{name}.lora_up.weight"].double() * trained, rtol=1e-6, atol=0)
    assert len(scales) > 10


@pytest.mark.parametrize(
    ("make", "network", "saver"),
    [
        (make_tiny_sd1, {"name": "lierla", "dora": True}, {}),
        (make_tiny_sd2, {"name": "c3lier", "dora": True, "conv_rank": 4, "conv_alpha": 2.0}, {"name": "pt"}),
        (make_tiny_sd1, {"name": "c3lier", "conv_rank": 4, "conv_alpha": 2.0}, {}),
    ],
    ids=["dora", "dora with convolutions", "lora"],
)
def test_copies_for_diffusers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any, network: dict[str, Any], saver: dict[str, Any]
) -> None:
    """The copy beside a file means in diffusers what the file means, magnitudes of both parts included."""
    folder = make(tmp_path / "model")
    images = write_photographs(tmp_path / "images", 4, 96)
    output = {"save_every_n_steps": 1, "keep_last": 2}
    file = trained_file(
        folder, images, tmp_path / "out", network=network, saver=saver, output=output, observers=[{"name": "diffusers"}]
    )
    copy = tmp_path / "out" / "lora.diffusers.safetensors"
    check(folder, file, 8, caplog, given=copy)
    magnitudes = [name for name in load_file(copy) if ".lora_magnitude_vector" in name]
    assert bool(magnitudes) == network.get("dora", False)
    stems = ("lora", "lora-step00000004", "lora-step00000005")
    kept = {f"{stem}{suffix}" for stem in stems for suffix in (file.suffix, ".diffusers.safetensors")}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".pt", ".safetensors")} == kept


@pytest.mark.slow
def test_full_size_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same with all of Stable Diffusion 1.5's layers, 24 photographs at 256 pixels, and buckets."""
    folder = make_folder(tmp_path / "model", FULL_SD1)
    model = to_single_file(folder, tmp_path / "model.safetensors")
    images = write_photographs(tmp_path / "images", 24, 300)
    data = {"resolution": 256, "enable_bucket": True}
    file = trained_file(model, images, tmp_path / "out", data=data)
    assert len(load_file(file)) == 3 * 264
    check(folder, file, 32, caplog)
