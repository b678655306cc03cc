"""Drawing: prompts to latents, and latents to pixels.

B pictures drawn at once, C latent channels, h and w latent sides, H and W picture sides in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorakit.models.conditioning import ImageSizes, collate, image_conditioning, split
from lorakit.plugins.build import build_component
from lorakit.previews.png import PreviewJob

if TYPE_CHECKING:
    from lorakit.models.interfaces import Conditioning, DiffusionModel

Texts = Mapping[str, "Conditioning"]
"""The conditioning of each text, without the batch side."""


def encode_texts(model: DiffusionModel, texts: Iterable[str], weighted: bool = False) -> dict[str, Conditioning]:
    """Conditioning of each text, without the batch side; cut off at the length that the model is set to.

    With `weighted`, brackets say how much words count.
    """
    encoder = model.text_encoder
    encoded = {text: encoder.encode(encoder.tokenize([text], weighted)) for text in dict.fromkeys(texts)}
    return {text: split(model, conditioning)[0] for text, conditioning in encoded.items()}


def sample_latents(
    model: DiffusionModel, pictures: Sequence[PreviewJob], texts: Texts, batch_size: int
) -> list[Tensor]:
    """The latents [C, h, w] of each picture; those of equal size, steps, sampler and scale are drawn together.

    `texts` must hold each prompt and negative prompt.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        prompt = picture.prompt
        key = (picture.width, picture.height, prompt.steps, picture.sampler, prompt.scale)
        groups.setdefault(key, []).append(index)
    drawn: dict[int, Tensor] = {}
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            chosen = group[start : start + batch_size]
            drawn.update(zip(chosen, _drawn(model, [pictures[index] for index in chosen], texts), strict=True))
    return [drawn[index] for index in range(len(pictures))]


def _drawn(model: DiffusionModel, pictures: Sequence[PreviewJob], texts: Texts) -> Tensor:
    """The latents [B, C, h, w] of pictures that differ only in their texts and seeds."""
    settings, sampler = pictures[0].prompt, build_component(pictures[0].sampler, model.noise)
    generators = [torch.Generator().manual_seed(picture.seed) for picture in pictures]
    shape = model.latent_shape(pictures[0].width, pictures[0].height)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    conditioning = _conditioning(model, pictures, texts)

    def predict(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        return classifier_free_guidance(model, noisy_latents, timestep, conditioning, settings.scale)

    latents: Tensor = sampler(predict, noise.to(next(model.denoiser.parameters()).device), settings.steps, generators)
    return latents


def _conditioning(model: DiffusionModel, pictures: Sequence[PreviewJob], texts: Texts) -> Conditioning:
    """What the denoiser is told, [B, …]; with guidance [2B, …], the negative prompts first."""
    wanted = [picture.prompt.prompt for picture in pictures]
    if pictures[0].prompt.scale > 1:
        wanted = [picture.prompt.negative_prompt for picture in pictures] + wanted
    sizes = [ImageSizes.whole(pictures[0].width, pictures[0].height)] * len(wanted)
    captions = collate(model, [texts[text] for text in wanted])
    by_sizes = image_conditioning(model, sizes).items()
    return {**captions, **{name: tensor.to(next(iter(captions.values())).device) for name, tensor in by_sizes}}


def classifier_free_guidance(
    model: DiffusionModel, noisy_latents: Tensor, timestep: Tensor, conditioning: Conditioning, scale: float
) -> Tensor:
    """The denoiser's output, float32 [B, C, h, w]; with a scale above 1 led away from the negative prompts."""
    if scale <= 1:
        return _predicted(model, noisy_latents, timestep, conditioning)
    doubled = torch.cat([noisy_latents, noisy_latents])
    away, towards = _predicted(model, doubled, timestep, conditioning).chunk(2)
    return away + scale * (towards - away)


def _predicted(model: DiffusionModel, noisy_latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    timesteps = timestep.to(noisy_latents.device).expand(len(noisy_latents))
    return model.predict(noisy_latents, timesteps, conditioning).float()


def decode(model: DiffusionModel, latents: Iterable[Tensor]) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """The pixels [H, W, 3] of each picture's latents [C, h, w]; one at a time, as decoding takes much memory.

    What is not a number, as from adapters that diverged, is grey.
    """
    for own in latents:
        image = model.vae_decoder.decode(own.unsqueeze(0))[0].nan_to_num(0)
        yield ((image + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
