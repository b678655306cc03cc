"""Pictures: pixels of images as they are encoded, with their masks, and what changes them from epoch to epoch.

Imports no torch. H and W bucket sides in pixels.
"""

from __future__ import annotations

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from lorakit.data.images.buckets import ResizeCrop
from lorakit.data.images.decode import load_mask, load_pixels, load_with_alpha
from lorakit.data.images.face_crop import around_face
from lorakit.data.index import Example
from lorakit.utils.rng import RngFactory

P_APPLY = 0.33
"""How often an image is changed; half of the time its hue, half of the time its gamma."""
LARGEST_HUE_SHIFT = 16.0
"""Degrees by which hues are turned at most, either way."""
GAMMAS = (0.95, 1.05)
"""The least and the greatest gamma."""


@frozen(eq=False)
class Picture:
    """The pixels of an image."""

    name: str
    """The image's file, for messages."""
    pixels: NDArray[np.uint8]
    """RGB, [H, W, 3]."""
    mask: NDArray[np.uint8] | None
    """How much the loss counts at each, from 0 to 255, [H, W]; None where all of it does."""


def load_picture(example: Example, placement: ResizeCrop) -> Picture:
    """The pixels and mask of an example, brought to the size of its bucket alike.

    Raises DataError where a file is damaged.
    """
    interpolation, name = example.subset.resize_interpolation, str(example.image)
    if example.mask is not None:
        mask = load_mask(example.mask, placement, interpolation)
        return Picture(name, load_pixels(example.image, placement, interpolation), mask)
    if example.subset.alpha_mask:
        return Picture(name, *load_with_alpha(example.image, placement, interpolation))
    return Picture(name, load_pixels(example.image, placement, interpolation), None)


def augmented_picture(example: Example, draw: RngFactory) -> Picture:
    """The image for one draw: cropped, color-jittered and flipped as its subset is configured."""
    picture = load_picture(example, crop_of(example, draw))
    if example.subset.color_aug:
        picture = evolve(picture, pixels=color_jitter(picture.pixels, draw("colours")))
    if is_mirrored(example, draw):
        mask = None if picture.mask is None else picture.mask[:, ::-1]
        picture = evolve(picture, pixels=picture.pixels[:, ::-1], mask=mask)
    return picture


def is_mirrored(example: Example, draw: RngFactory) -> bool:
    """Whether an image is mirrored this once: in half of all cases if it is to be at all."""
    return example.subset.flip_aug and bool(draw("flip").integers(2))


def crop_of(example: Example, draw: RngFactory) -> ResizeCrop:
    """The part of the image that is used this once."""
    placement, subset = example.placement, example.subset
    if example.face is not None and subset.face_crop_aug_range is not None:
        return around_face(
            example.face, placement.bucket, subset.face_crop_aug_range, draw("crop"), anywhere=subset.random_crop
        )
    if not subset.random_crop:
        return placement
    room = np.subtract(placement.resized, placement.bucket)
    left, top = draw("crop").integers(0, room, endpoint=True)
    return evolve(placement, crop_xy=(int(left), int(top)))


def color_jitter(pixels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """RGB pixels [H, W, 3] as they are, or with another hue, or with another gamma."""
    if generator.random() >= P_APPLY:
        return pixels
    if generator.random() < 0.5:
        return with_hue_shifted(pixels, generator.uniform(-LARGEST_HUE_SHIFT, LARGEST_HUE_SHIFT))
    return with_gamma(pixels, generator.uniform(*GAMMAS))


def with_gamma(pixels: NDArray[np.uint8], gamma: float) -> NDArray[np.uint8]:
    """255·(x/255)^γ of each number: black and white stay, and what is between gets darker where γ is above 1."""
    levels = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return np.take(levels, pixels)


def with_hue_shifted(pixels: NDArray[np.uint8], degrees: float) -> NDArray[np.uint8]:
    """RGB pixels with hues turned on the colour circle; saturation and value, as HSV has them, stay.

    With V the largest channel and C its distance to the smallest, a channel of hue H is
    V − C·max(0, min(k, 4 − k, 1)), where k = (n + H/60°) mod 6 and n = 5, 3, 1 for red, green and blue.
    """
    numbers = pixels.astype(np.float32)
    red, green, blue = np.moveaxis(numbers, -1, 0)
    value = numbers.max(axis=-1)
    chroma = value - numbers.min(axis=-1)
    divisor = np.maximum(chroma, 1)
    hue = np.select(
        [value == red, value == green],
        [(green - blue) / divisor, 2 + (blue - red) / divisor],
        4 + (red - green) / divisor,
    )
    k = (np.array([5, 3, 1], np.float32) + (hue + degrees / 60)[..., None]) % 6
    shifted = value[..., None] - chroma[..., None] * np.minimum(k, 4 - k).clip(0, 1)
    whole: NDArray[np.uint8] = np.rint(shifted).astype(np.uint8)
    return whole
