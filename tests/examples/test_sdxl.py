"""The script that trains the small Stable Diffusion XL: a real folder, and sizes that are those of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoder import as_tensor
from parts import load
from pictures import SIDE, training_picture
from score import MODEL, load_pipeline, paint
from sdxl import CANVAS, cut_out, place, rescaled, train

from lorakit.checkpoints.summary import summarize
from lorakit.models.families.sd.detect import detect
from lorakit.models.families.sdxl.checkpoint import SDXLCheckpoint


def test_cut_out_pictures() -> None:
    """A picture is whole, or cut out where its sizes say."""
    picture = training_picture(0, 0)
    assert cut_out(picture, None) == (picture, (SIDE, SIDE, 0, 0, SIDE, SIDE))
    cut, ids = cut_out(picture, (3, 5))
    assert ids == (CANVAS, CANVAS, 3, 5, SIDE, SIDE)
    assert np.array_equal(cut[:-3, :-5], picture[3:, 5:])
    assert (cut[:, -5:] == cut[:, -6:-5]).all()
    places = [place(0, index) for index in range(1000)]
    assert 0.35 < sum(own is not None for own in places) / 1000 < 0.45
    assert {max(own) for own in places if own} == {*range(CANVAS - SIDE + 1)}


@torch.no_grad()
def test_rescaled_vae() -> None:
    """Latents are larger, and pictures the same."""
    images = as_tensor([training_picture(0, index) for index in range(4)])
    plain, vae = load(MODEL, "vae"), rescaled(load(MODEL, "vae"))
    before, after = (own.encode(images).latent_dist for own in (plain, vae))
    ratio = 0.18215 / 0.13025
    torch.testing.assert_close(after.mean, before.mean * ratio)
    torch.testing.assert_close(after.std, before.std * ratio)
    torch.testing.assert_close(vae.decode(after.mean).sample, plain.decode(before.mean).sample, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("lorakit_offline")
def test_a_short_course(tmp_path: Path) -> None:
    """After two steps there is a whole SDXL that lorakit knows and diffusers draws with."""
    train(tmp_path / "model", steps=2, pictures=8)
    found = detect(summarize(tmp_path / "model"))
    assert found is not None
    assert found.name == "sdxl"
    checkpoint = SDXLCheckpoint(tmp_path / "model")
    checkpoint.check()
    checkpoint.check_vae()
    (picture,) = paint(load_pipeline(tmp_path / "model"), ["a red disc"], steps=1)
    assert picture.shape == (SIDE, SIDE, 3)
