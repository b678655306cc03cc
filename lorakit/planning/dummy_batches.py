"""Batches of the shapes that a run trains on, without its images and captions.

B images in a micro-batch.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from lorakit.data.batch_sampler import Bucket, buckets
from lorakit.data.images.buckets import Size
from lorakit.data.loader import Batch
from lorakit.data.review import longest_by_image
from lorakit.diffusion.noise import normal
from lorakit.models.conditioning import ImageSizes, collate, image_conditioning
from lorakit.models.interfaces import Conditioning, DiffusionModel, Tokens
from lorakit.planning.memory_tracker import fake_tensors
from lorakit.training.prepare import PreparedRun
from lorakit.training.setup import load_model
from lorakit.utils.rng import keyed_generator

CPU = torch.device("cpu")


@frozen
class BatchShape:
    """The shape of micro-batches."""

    images: int
    """B."""
    size: Size
    """Width and height of the images in pixels."""

    @property
    def pixels(self) -> int:
        """Pixels of all its images together, which the memory that it takes grows with."""
        return self.images * self.size[0] * self.size[1]

    @classmethod
    def of(cls, bucket: Bucket) -> BatchShape:
        """The largest micro-batches of a bucket."""
        return cls(min(bucket.batch_size, bucket.appearances), bucket.size)


def largest_shape(prepared: PreparedRun) -> BatchShape:
    """The shape of the largest micro-batches of a run."""
    return max((BatchShape.of(bucket) for bucket in buckets(prepared.datasets)), key=lambda shape: shape.pixels)


def longest_caption(prepared: PreparedRun) -> str:
    """The longest caption of a run, of which some models make longer sequences than of others."""
    return max(longest_by_image((*prepared.datasets, *prepared.validation)).values(), key=len, default="")


@frozen
class Texts:
    """What micro-batches hold of the longest caption: its conditioning, without the batch side, or its tokens."""

    conditioning: Conditioning | None
    tokens: Tokens | None

    @classmethod
    def of(cls, prepared: PreparedRun) -> Texts:
        """With the shapes and dtypes of a run; loads no weights."""
        model = load_model(prepared.config, CPU)
        with fake_tensors(), torch.no_grad():
            tokens = model.text_encoder.tokenize([longest_caption(prepared)], prepared.config.data.weighted_captions)
            # Not `split`, which asks for the lengths of captions, and these tensors have no numbers.
            encoded = None if prepared.encodes_captions else model.text_encoder.encode(tokens)
            fake = encoded and {name: tensor[0] for name, tensor in encoded.items()}
        # Outside the block, in which tensors would have no numbers.
        return cls(None, _made_up(tokens)) if fake is None else cls(_made_up(fake), None)


def make_batch(shape: BatchShape, texts: Texts, model: DiffusionModel) -> Batch:
    """A micro-batch of that shape, of noise, on the CPU; reads no weights."""
    latents = shape.images, *model.latent_shape(*shape.size)
    return Batch(
        latents=normal(keyed_generator("plan", "latents"), latents),
        noise=normal(keyed_generator("plan", "noise"), latents),
        timesteps=torch.full((shape.images,), model.noise.spec.timestep(0.5)),
        weights=torch.ones(shape.images),
        sample_seeds=torch.arange(shape.images),
        conditioning=texts.conditioning and collate(model, [texts.conditioning] * shape.images),
        tokens=texts.tokens
        and {name: tensor.repeat(shape.images, *[1] * (tensor.ndim - 1)) for name, tensor in texts.tokens.items()},
        images=("noise",) * shape.images,
        share=1.0,
        image_conditioning=image_conditioning(model, [ImageSizes.whole(*shape.size)] * shape.images) or None,
    )


def _made_up(tensors: Conditioning | Tokens) -> dict[str, Tensor]:
    """Noise, or the first token, in the shapes of fake tensors."""
    generator = keyed_generator("plan", "texts")
    return {
        name: normal(generator, tensor.shape).to(tensor.dtype)
        if tensor.is_floating_point()
        else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }
