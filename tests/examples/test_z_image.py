"""The script that trains the small Z-Image: a folder that lorakit and diffusers read as the very model it trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from autoencoder import as_tensor, latents_of, normalise
from pace import Average, Budget
from parts import load
from pictures import SIDE, training_caption, training_picture
from score import MODEL, load_pipeline, paint
from torch.nn.functional import scaled_dot_product_attention
from z_image import (
    CHANNELS,
    Velocity,
    attention,
    build_text_encoder,
    build_transformer,
    ids_of,
    learning_material,
    optimizers_of,
    restore,
    save,
    stored_vae,
    train,
    widened,
    world_tokenizer,
)

from lorakit.builtin.model_families.z_image import ZImageConfig
from lorakit.models.families.z_image.transformer import MULTIPLE

CPU = torch.device("cpu")


@torch.no_grad()
def test_widened_vae() -> None:
    """It makes the same pictures; the four known channels of latents are the same, and the others hold something."""
    images = as_tensor([training_picture(0, index) for index in range(4)])
    plain, wide = load(MODEL, "vae"), widened(load(MODEL, "vae"))
    before, after = (own.encode(images).latent_dist for own in (plain, wide))
    assert after.mean.shape[1] == CHANNELS
    torch.testing.assert_close(after.mean[:, :4], before.mean)
    torch.testing.assert_close(after.std[:, :4], before.std)
    torch.testing.assert_close(wide.decode(after.mean).sample, plain.decode(before.mean).sample)
    assert after.mean[:, 4:].std((0, 2, 3)).min() > 1


@torch.no_grad()
def test_latents_of_the_vae_are_as_its_settings_say() -> None:
    """After folding, latents have FLUX.1's mean and scale; pictures stay."""
    images = as_tensor([training_picture(0, index) for index in range(4)])
    vae = widened(load(MODEL, "vae"))
    vae.decoder.conv_in.weight[:, 4:] = 0.01
    before = vae(images).sample
    normalise(vae, 0)
    torch.testing.assert_close(vae(images).sample, before, atol=1e-3, rtol=1e-3)
    many = as_tensor([training_picture(5, index) for index in range(200)])
    raw = vae.encode(many).latent_dist.mean
    assert (raw.mean((0, 2, 3)) - 0.1159).abs().max() < 0.3 / 0.3611
    assert (latents_of(vae, many).std((0, 2, 3)) - 1).abs().max() < 0.3


def test_tokens() -> None:
    """Each word of the world is a token, and captions fit; a made-up word is its letters."""
    tokenizer = world_tokenizer()
    captions = [training_caption(1, index) for index in range(500)]
    ids = ids_of(tokenizer, captions)
    assert ids.shape == (500, MULTIPLE)
    assert (ids == tokenizer.pad_token_id).any(1).all()
    told = tokenizer.tokenize(" a chequered zorp")
    assert told == ["Ġa", "Ġchequered", "Ġ", "z", "o", "r", "p"]


def test_attention() -> None:
    """The same as PyTorch's."""
    query, key, value = torch.randn(3, 2, 4, 64, 32, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(
        attention(query, key, value), scaled_dot_product_attention(query, key, value), rtol=1e-6, atol=1e-6
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with PyTorch 2.9")
@pytest.mark.usefixtures("lorakit_offline")
def test_a_short_course(tmp_path: Path) -> None:
    """The loss falls; lorakit predicts with the folder what was trained, and diffusers draws with it."""
    vae, tokenizer = widened(load(MODEL, "vae")), world_tokenizer()
    normalise(vae, 0)
    model = Velocity(build_text_encoder(len(tokenizer)), build_transformer())
    material = learning_material(vae, tokenizer, 16, seed=7)
    before = error_of(model, material)
    train(model, material, Budget(40), 7, lambda: save(tmp_path, model, vae, tokenizer))
    assert error_of(model, material) < before - 0.2
    found = ZImageConfig(path=str(tmp_path))
    assert not list(found.problems())
    stored = found.build(CPU, torch.float32)
    captions = [training_caption(7, index) for index in range(2)]
    noisy, times = material[0][:2], torch.tensor([0.2, 0.9])
    with torch.no_grad():
        expected = model(noisy, times, ids_of(tokenizer, captions))
        conditioning = stored.text_encoder.encode(stored.text_encoder.tokenize(captions))
        torch.testing.assert_close(stored.predict(noisy, times, conditioning), expected, rtol=1e-3, atol=1e-4)
    again = Velocity(build_text_encoder(len(tokenizer)), build_transformer())
    restore(again, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(noisy, times, ids_of(tokenizer, captions)), expected)
    assert stored_vae(tmp_path).config.shift_factor == 0.1159
    (picture,) = paint(load_pipeline(tmp_path), ["a red disc"], steps=1)
    assert picture.shape == (SIDE, SIDE, 3)


@torch.no_grad()
def error_of(model: Velocity, material: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """The mean square error of velocities half-way to noise."""
    latents, tokens, _ = material
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    found = model((latents + noise) / 2, torch.full((len(latents),), 0.5), tokens[:, 0])
    return float((found - (noise - latents)).square().mean())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with PyTorch 2.9")
def test_all_that_is_trained_has_an_optimizer() -> None:
    """Each parameter is in one of the two, but the embeddings of tokens, which stay."""
    model = Velocity(build_text_encoder(300), build_transformer())
    names = {parameter: name for name, parameter in model.named_parameters()}
    both = [own for optimizer, _ in optimizers_of(model) for group in optimizer.param_groups for own in group["params"]]
    assert len(both) == len(names) - 1
    assert {*names.values()} - {names[own] for own in both} == {"text_encoder.embed_tokens.weight"}


def test_the_mean_of_weights_for_a_while() -> None:
    """The mean is in the module inside the block, and its own weights after it."""
    layer = torch.nn.Linear(2, 2)
    average = Average(layer)
    start = layer.weight.clone()
    with torch.no_grad():
        layer.weight += 1
    with average.applied():
        assert torch.equal(layer.weight, start)
    torch.testing.assert_close(layer.weight, start + 1)
