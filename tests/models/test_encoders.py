"""Text and image encoders, against transformers and diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel

from lorakit.errors import ModelError
from lorakit.models.vae import VaeDecoder, VaeEncoder
from tests.models.building import read, stable_diffusion

CAPTION = "a photo of a cat"


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors, for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def reference(tiny_sd1: Path) -> CLIPTextModel:
    """The text encoder as transformers loads it."""
    return CLIPTextModel.from_pretrained(tiny_sd1 / "text_encoder").eval()


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_hidden_states_are_those_of_transformers(tiny_sd1_file: Path, reference: CLIPTextModel, clip_skip: int) -> None:
    """`clip_skip` k reads the k-th layer from the end through the last normalisation; 1 is the usual output."""
    encoder = stable_diffusion(tiny_sd1_file, clip_skip=clip_skip).text_encoder
    tokens = encoder.tokenize([CAPTION, "two dogs"])
    output = reference(tokens["ids"][:, 0], output_hidden_states=True)
    expected = reference.final_layer_norm(output.hidden_states[-clip_skip])
    torch.testing.assert_close(encoder.encode(tokens)["hidden_states"], expected)
    if clip_skip == 1:
        torch.testing.assert_close(expected, output.last_hidden_state)


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_are_encoded_alone_and_joined(tiny_sd1_file: Path, reference: CLIPTextModel, chunks: int) -> None:
    """Of n chunks, the states are one start, 75 of each chunk, and one end: 75n + 2."""
    encoder = stable_diffusion(tiny_sd1_file, max_token_length=75 * chunks).text_encoder
    tokens = encoder.tokenize([" ".join([CAPTION] * 60), CAPTION])
    states = encoder.encode(tokens)["hidden_states"]
    assert states.shape == (2, 75 * chunks + 2, 32)
    for row in range(2):
        alone = [reference(tokens["ids"][row, index : index + 1]).last_hidden_state[0] for index in range(chunks)]
        expected = torch.cat([alone[0][:1], *(chunk[1:-1] for chunk in alone), alone[-1][-1:]])
        torch.testing.assert_close(states[row], expected)


def test_more_layers_than_there_are_cannot_be_skipped(tiny_sd1_file: Path) -> None:
    """A `clip_skip` beyond the encoder's layers is refused with their number."""
    with pytest.raises(ModelError, match="has 3 layers; clip_skip must be at most that, not 4"):
        read(stable_diffusion(tiny_sd1_file, clip_skip=4), "text_encoder")


def test_latents_are_those_of_diffusers(tiny_sd1_file: Path, tiny_sd1: Path) -> None:
    """Mean and deviation are those of diffusers' VAE times the scaling factor, in float32."""
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    mean, deviation = stable_diffusion(tiny_sd1_file).vae_encoder.encode(images)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(tiny_sd1 / "vae").encode(images).latent_dist
    torch.testing.assert_close(mean, expected.mean * 0.18215)
    torch.testing.assert_close(deviation, expected.std * 0.18215)
    assert mean.shape == (2, 4, 8, 6)
    assert mean.dtype == deviation.dtype == torch.float32


def test_images_are_those_of_diffusers(tiny_sd1_file: Path, tiny_sd1: Path) -> None:
    """Decoded images are those of diffusers' VAE for the unscaled latents, in float32, cut off at -1 and 1."""
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0)) * 0.18215
    images = stable_diffusion(tiny_sd1_file).vae_decoder.decode(latents)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(tiny_sd1 / "vae").decode(latents / 0.18215).sample
    assert expected.abs().max() > 1
    torch.testing.assert_close(images, expected.clamp(-1, 1))
    assert images.shape == (2, 3, 64, 48)
    assert images.dtype == torch.float32


def test_only_the_decoder_is_read(tiny_sd1_file: Path) -> None:
    """The decoder comes without the encoder's weights."""
    names = {name.partition(".")[0] for name in stable_diffusion(tiny_sd1_file).vae_decoder.module.state_dict()}
    assert names == {"decoder", "post_quant_conv"}


def test_decoding_that_overflows_half_precision_is_mended(tiny_sd1_file: Path) -> None:
    """An image that overflows float16 is decoded again in float32, its neighbour is left as it is."""
    decoder = stable_diffusion(tiny_sd1_file, torch.float16).vae_decoder
    decoder.module.decoder.conv_in.weight.mul_(3000)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.001
    latents[1] *= 2000
    half = decoder.module.decoder(decoder.module.post_quant_conv(latents.half() / 0.18215))
    assert [image.isfinite().all().item() for image in half] == [True, False]
    images = decoder.decode(latents)
    exact = stable_diffusion(tiny_sd1_file, torch.float16).vae_decoder.module.float()
    exact.decoder.conv_in.weight.mul_(3000)
    torch.testing.assert_close(images, VaeDecoder(exact, 0.18215).decode(latents), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(images[:1], decoder.decode(latents[:1]), rtol=1e-2, atol=1e-2)
    assert decoder.module.decoder.conv_in.weight.dtype == torch.float16


def test_scaling_factor_of_a_folder_is_used(tiny_sd1: Path, tmp_path: Path) -> None:
    """A folder's VAE says its own scaling factor."""
    vae = AutoencoderKL.from_pretrained(tiny_sd1 / "vae")
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    images = torch.rand(1, 3, 64, 64)
    other, _ = stable_diffusion(tiny_sd1, vae=tmp_path / "vae").vae_encoder.encode(images)
    own, _ = stable_diffusion(tiny_sd1).vae_encoder.encode(images)
    torch.testing.assert_close(other / 0.5, own / 0.18215)


def test_overflow_in_half_precision_is_mended_per_image(tiny_sd1_file: Path) -> None:
    """An image that overflows float16 is encoded again in float32; the others in its batch are left as they are."""
    encoder = stable_diffusion(tiny_sd1_file, torch.float16).vae_encoder
    encoder.module.encoder.conv_in.weight.mul_(3000)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    images[1] *= 2000
    half = encoder.module.encoder(images.half())
    assert not half[1].isfinite().all()
    assert half[[0, 2]].isfinite().all()
    mean, deviation = encoder.encode(images)
    exact = stable_diffusion(tiny_sd1_file, torch.float16).vae_encoder.module.float()
    exact.encoder.conv_in.weight.mul_(3000)
    expected, _ = VaeEncoder(exact, 0.18215).encode(images)
    assert mean.isfinite().all()
    assert deviation.isfinite().all()
    torch.testing.assert_close(mean[1], expected[1], rtol=2e-3, atol=2e-3)
    alone, _ = encoder.encode(images[:1])
    # Half precision rounds differently in batches of other sizes.
    torch.testing.assert_close(mean[:1], alone, rtol=2e-3, atol=2e-3)
    assert encoder.module.encoder.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize(("dtype", "waits"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_the_host_waits_for_the_device_in_float16_alone(tiny_sd1_file: Path, dtype: torch.dtype, waits: bool) -> None:
    """No number is read from the device in encoding and decoding, but whether float16 has overflowed."""
    model = stable_diffusion(tiny_sd1_file, dtype)
    encoder, decoder = model.vae_encoder, model.vae_decoder
    with Reads() as reads:
        mean, _ = encoder.encode(torch.rand(2, 3, 64, 64))
        decoder.decode(mean)
    assert reads.number == (2 if waits else 0)


def test_vae_in_float32(tiny_sd1_file: Path) -> None:
    """With `no_half_vae` latents are those of a float32 model, bit for bit, and so is their key; captions stay half."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    half, mixed = (stable_diffusion(tiny_sd1_file, torch.bfloat16, no_half_vae=on) for on in (False, True))
    full = stable_diffusion(tiny_sd1_file)
    exact, _ = full.vae_encoder.encode(images)
    assert torch.equal(mixed.vae_encoder.encode(images)[0], exact)
    assert not torch.equal(half.vae_encoder.encode(images)[0], exact)
    assert mixed.fingerprint("vae_encoder") == full.fingerprint("vae_encoder") != half.fingerprint("vae_encoder")
    assert mixed.fingerprint("text_encoder") == half.fingerprint("text_encoder")
