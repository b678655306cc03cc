"""One micro-batch for a tiny model, and what the model makes of it.

B images, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.api.components import NetworkConfig
from lorakit.api.loss import LossConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.data.loader import Batch
from lorakit.models.conditioning import ImageSizes, image_conditioning
from lorakit.models.interfaces import Conditioning, DiffusionModel
from lorakit.plugins.catalog import Catalog
from lorakit.training.step.loss import Criterion, denoising_loss

CPU = torch.device("cpu")
CAPTIONS = ("a meadow, green grass", "a very long caption about a city at night, " * 3)


def read_model(path: Path, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """The Stable Diffusion 1.x in a file or folder, on the CPU."""
    return Catalog.discover().find(ModelFamilyConfig, "sd1")(path=str(path)).build(CPU, dtype)


def pictures(count: int = 2, side: int = 64) -> Tensor:
    """Random images [B, 3, side, side] in [-1, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make_batch(model: DiffusionModel) -> Batch:
    """Two images at different timesteps, the captions as tokens."""
    generator = torch.Generator().manual_seed(1)
    latents, _ = model.vae_encoder.encode(pictures())
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        timesteps=torch.tensor([model.noise.spec.timestep(fraction) for fraction in (0.1, 0.7)]),
        weights=torch.ones(2),
        sample_seeds=torch.tensor([11, 12]),
        conditioning=None,
        tokens=model.text_encoder.tokenize(CAPTIONS),
        images=("meadow.png", "city.png"),
        share=1.0,
        image_conditioning=image_conditioning(
            model, [ImageSizes.whole(64, 64), ImageSizes((96, 64), (8, 0), (64, 64))]
        ),
    )


def conditioning_of(model: DiffusionModel, batch: Batch) -> Conditioning:
    """The batch's conditioning, from the text encoder and from the images' sizes."""
    assert batch.tokens is not None
    return {**model.text_encoder.encode(batch.tokens), **(batch.image_conditioning or {})}


def predict(model: DiffusionModel, batch: Batch) -> Tensor:
    """The model's prediction for the batch, [B, C, h, w]; the text encoder takes part."""
    noisy_latents = model.noise.add_noise(batch.latents, batch.noise, batch.timesteps)
    return model.predict(noisy_latents, batch.timesteps, conditioning_of(model, batch))


def loss_of(model: DiffusionModel, batch: Batch) -> Tensor:
    """The training loss of the batch, a scalar; the text encoder takes part."""
    loss = Catalog.discover().find(LossConfig, "l2")()
    return denoising_loss(model, batch, conditioning_of(model, batch), Criterion.of(loss, model.noise))


def encodings(model: DiffusionModel) -> list[Tensor]:
    """What a model's encoders and its decoder give for the captions and a picture."""
    with torch.no_grad():
        conditioning = model.text_encoder.encode(model.text_encoder.tokenize(CAPTIONS))
        mean, deviation = model.vae_encoder.encode(pictures())
        return [mean, deviation, model.vae_decoder.decode(mean), *conditioning.values()]


def loss_and_gradients(model: DiffusionModel, parts: tuple[str, ...]) -> list[Tensor]:
    """The loss of a batch, and the gradients of LoRA adapters in these parts."""
    network = Catalog.discover().find(NetworkConfig, "lierla")(parts=parts).build(model.targets(parts)).train()
    for adapter in network.adapters:
        nn.init.constant_(adapter.lora_up, 0.01)  # type: ignore[arg-type]
    loss = loss_of(model, make_batch(model))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [own.grad for part in parts for own in network.parameters_of(part)]
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]
