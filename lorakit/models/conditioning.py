"""What a family may add to captions: how they are put together in a batch, and conditioning by the image's sizes.

A model that has the methods of one of these protocols is asked; for any other, captions have one
length, and images tell nothing. B images in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from attrs import frozen
from torch import Tensor

from lorakit.models.interfaces import Conditioning, DiffusionModel


@frozen
class ImageSizes:
    """How an image was made from its file; all in pixels, width before height."""

    original: tuple[int, int]
    """The size of the file's image as it is seen, before it was resized."""
    crop: tuple[int, int]
    """How far from the left and the top of the resized image the crop begins; from the right where it is mirrored."""
    target: tuple[int, int]
    """The size that the denoiser sees."""

    @classmethod
    def whole(cls, width: int, height: int) -> ImageSizes:
        """Those of an image that was neither resized nor cropped, such as a preview."""
        return cls((width, height), (0, 0), (width, height))


@runtime_checkable
class CollatesCaptions(Protocol):
    """A model whose captions have different lengths; both methods read no weights."""

    def split(self, conditioning: Conditioning) -> Sequence[Conditioning]:
        """Each caption's own conditioning, without the batch side and without padding, of an encoded batch."""

    def collate(self, captions: Sequence[Conditioning]) -> Conditioning:
        """The batch of captions that `split` has made, padded to one length, with masks; each tensor [B, …].

        Entries that `encode` has made beside those that `split` keeps are ignored.
        """


@runtime_checkable
class ImageConditioned(Protocol):
    """A model whose denoiser takes an image's sizes; it reads no weights for that."""

    def image_conditioning(self, sizes: Sequence[ImageSizes]) -> Conditioning:
        """What the denoiser gets beside the captions' conditioning, by other names, [B, …], on the CPU."""


@runtime_checkable
class TrainsWithAdapter(Protocol):
    """A model that a LoRA file may be part of only while it trains."""

    def without_training_adapter(self) -> AbstractContextManager[None]:
        """Inside, the denoiser computes as it is without that file; there may be none."""


@runtime_checkable
class EncodesOneByOne(Protocol):
    """A model with several text encoders, of which one at a time is in memory while captions are cached."""

    def encode_one_by_one(self, batches: Sequence[Sequence[str]], weighted: bool) -> Sequence[Conditioning]:
        """The conditioning of batches of captions; with `weighted`, brackets weight words.

        Each text encoder is read, encodes all of them, and is freed before the next is read.
        """


def without_training_adapter(model: DiffusionModel) -> AbstractContextManager[None]:
    """Inside, the denoiser computes without a LoRA file that is part of it only while it trains."""
    return model.without_training_adapter() if isinstance(model, TrainsWithAdapter) else nullcontext()


def encode_frozen(
    model: DiffusionModel, batches: Sequence[Sequence[str]], weighted: bool = False
) -> Iterator[Conditioning]:
    """The conditioning of batches of captions by frozen text encoders; with `weighted`, brackets weight words."""
    if isinstance(model, EncodesOneByOne):
        yield from model.encode_one_by_one(batches, weighted)
        return
    encoder = model.text_encoder
    for captions in batches:
        with torch.no_grad():
            conditioning = encoder.encode(encoder.tokenize(captions, weighted))
        yield conditioning


def split(model: DiffusionModel, conditioning: Conditioning) -> Sequence[Conditioning]:
    """The conditioning of each caption of an encoded batch, without the batch side."""
    if isinstance(model, CollatesCaptions):
        return model.split(conditioning)
    count = len(next(iter(conditioning.values())))
    return [{name: tensor[row] for name, tensor in conditioning.items()} for row in range(count)]


def collate(model: DiffusionModel, captions: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of captions as one batch, [B, …]; raises RuntimeError or KeyError where they do not fit."""
    if isinstance(model, CollatesCaptions):
        return model.collate(captions)
    return {name: torch.stack([caption[name] for caption in captions]) for name in captions[0]}


def image_conditioning(model: DiffusionModel, sizes: Sequence[ImageSizes]) -> Mapping[str, Tensor]:
    """The conditioning by the sizes of images, [B, …]; empty for a model that takes none."""
    return model.image_conditioning(sizes) if isinstance(model, ImageConditioned) else {}
