"""Sampling: prompts to latents, and latents to pixels.

B images sampled at once, C latent channels, h and w latent sides, H and W image sides in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorakit.models.conditioning import ImageSizes, collate, image_conditioning, split, without_training_adapter
from lorakit.plugins.build import build_component
from lorakit.previews.prompts import PreviewJob

if TYPE_CHECKING:
    from lorakit.models.interfaces import Conditioning, DiffusionModel

Texts = Mapping[str, "Conditioning"]
"""The conditioning of each text, without the batch side."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""An image, [H, W, 3]."""


def encode_texts(model: DiffusionModel, texts: Iterable[str], weighted: bool = False) -> dict[str, Conditioning]:
    """The conditioning of each text, without the batch side; truncated to the model's caption length.

    With `weighted`, brackets weight words.
    """
    encoder = model.text_encoder
    encoded = {text: encoder.encode(encoder.tokenize([text], weighted)) for text in dict.fromkeys(texts)}
    return {text: split(model, conditioning)[0] for text, conditioning in encoded.items()}


def sample_latents(model: DiffusionModel, jobs: Sequence[PreviewJob], texts: Texts, batch_size: int) -> list[Tensor]:
    """The latents [C, h, w] of each image; those of equal size, steps, sampler and scales are sampled together.

    `texts` must hold each prompt and negative prompt.
    """
    sampled: dict[int, Tensor] = {}
    for chosen in preview_batches(jobs, batch_size):
        sampled.update(zip(chosen, _sample(model, [jobs[index] for index in chosen], texts), strict=True))
    return [sampled[index] for index in range(len(jobs))]


def preview_batches(jobs: Sequence[PreviewJob], batch_size: int) -> list[list[int]]:
    """The numbers of the images that are sampled together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        key = (job.width, job.height, job.steps, job.sampler, job.scale, job.guidance)
        groups.setdefault(key, []).append(index)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


def _sample(model: DiffusionModel, jobs: Sequence[PreviewJob], texts: Texts) -> Tensor:
    """The latents [B, C, h, w] of images that differ only in their texts and seeds.

    With guidance the conditioning is [2B, …], the negative prompts first.
    """
    scale, sampler = jobs[0].scale, build_component(jobs[0].sampler, model.noise)
    generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
    shape = model.latent_shape(jobs[0].width, jobs[0].height)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    device = next(model.denoiser.parameters()).device
    wanted = [job.prompt.prompt for job in jobs]
    if scale > 1:
        wanted = [job.prompt.negative_prompt for job in jobs] + wanted
    conditioning = dict(collate(model, [texts[text] for text in wanted]))
    text_device = next(iter(conditioning.values())).device
    sizes = [ImageSizes.whole(jobs[0].width, jobs[0].height)] * len(wanted)
    conditioning |= {name: tensor.to(text_device) for name, tensor in image_conditioning(model, sizes).items()}
    if jobs[0].guidance is not None:
        conditioning["guidance"] = torch.full((len(wanted),), jobs[0].guidance, device=text_device)

    def predict(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        return classifier_free_guidance(model, noisy_latents, timestep, conditioning, scale)

    with without_training_adapter(model):
        latents: Tensor = sampler(predict, noise.to(device), jobs[0].steps, generators)
    return latents


def classifier_free_guidance(
    model: DiffusionModel, noisy_latents: Tensor, timestep: Tensor, conditioning: Conditioning, scale: float
) -> Tensor:
    """The denoiser's output, float32 [B, C, h, w]; with a scale above 1 guided away from the negative prompts."""
    inputs = torch.cat([noisy_latents, noisy_latents]) if scale > 1 else noisy_latents
    timesteps = timestep.to(inputs.device).expand(len(inputs))
    prediction = model.predict(inputs, timesteps, conditioning).float()
    if scale <= 1:
        return prediction
    away, towards = prediction.chunk(2)
    return away + scale * (towards - away)


def decode(model: DiffusionModel, latents: Iterable[Tensor]) -> Iterator[Pixels]:
    """The pixels [H, W, 3] of each image's latents [C, h, w]; one at a time, because decoding takes much memory.

    NaN, as from adapters that diverged, becomes grey.
    """
    for latent in latents:
        image = model.vae_decoder.decode(latent.unsqueeze(0))[0].nan_to_num(0)
        yield ((image + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
