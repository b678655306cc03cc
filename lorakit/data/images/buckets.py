"""Buckets: the sizes that images are brought to, so that images of one micro-batch have one size.

Sizes are (width, height) in pixels. The arithmetic is that of sd-scripts, to the pixel.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, sqrt

from attrs import Factory, field, frozen

from lorakit.config.datasets import DatasetConfig
from lorakit.errors import DataError, Problem

Size = tuple[int, int]
"""Width and height in pixels."""


@frozen
class ResizeCrop:
    """How an image is brought to the size of its bucket: resized, then cropped."""

    resized: Size
    """Size of the whole image after resizing; covers the bucket."""
    bucket: Size
    """Size of what is left after cropping."""
    crop_xy: Size = field(default=Factory(lambda self: self.middle, takes_self=True))
    """What is left begins that far from the left and the top of the resized image; its middle is left by default."""

    @property
    def middle(self) -> Size:
        """The corner with which as much is cropped on one side as on the other."""
        return (self.resized[0] - self.bucket[0]) // 2, (self.resized[1] - self.bucket[1]) // 2


@lru_cache(maxsize=64)
def bucket_resolutions(resolution: Size, minimum: int, maximum: int, step: int) -> tuple[Size, ...]:
    """All bucket sizes of about the area of `resolution`, sorted.

    Sides are multiples of `step` pixels between `minimum`, rounded down to such a multiple, and
    `maximum`, rounded up.
    """
    area = resolution[0] * resolution[1]
    shortest = max(minimum // step, 1) * step
    longest = -(-maximum // step) * step
    square = int(sqrt(area) / step) * step
    sizes = {(square, square)} if square else set()
    for width in range(shortest, longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def assign_bucket(size: Size, dataset: DatasetConfig) -> ResizeCrop:
    """How an image of this size (as it is seen, after rotation) is brought to a bucket of the dataset.

    Raises DataError, without the image's name, where no bucket fits.
    """
    if not dataset.enable_bucket:
        return _cover(size, dataset.resolution)
    if dataset.bucket_no_upscale:
        return _shrink_only(size, dataset.resolution[0] * dataset.resolution[1], dataset.bucket_reso_steps)
    step = dataset.bucket_reso_steps
    sizes = bucket_resolutions(dataset.resolution, dataset.min_bucket_reso, dataset.max_bucket_reso, step)
    if not sizes:
        width, height = dataset.resolution
        message = f"bucket_reso_steps {step} leave no bucket within the area of resolution {width}x{height}"
        raise DataError(str(Problem("", message, "lower bucket_reso_steps")))
    aspect = size[0] / size[1]
    closest = size if size in sizes else min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))
    return _cover(size, closest)


def _cover(size: Size, bucket: Size) -> ResizeCrop:
    """The smallest enlargement or reduction that covers the bucket."""
    width, height = size
    scale = bucket[1] / height if width / height > bucket[0] / bucket[1] else bucket[0] / width
    return ResizeCrop((int(width * scale + 0.5), int(height * scale + 0.5)), bucket)


def _shrink_only(size: Size, area: int, step: int) -> ResizeCrop:
    """The image's own size, or what it shrinks to if it has more than `area` pixels, rounded down to steps."""
    width, height = size
    if width * height > area:
        aspect = width / height
        ideal_width = sqrt(area * aspect)
        by_width, by_height = _stepped(ideal_width, step), _stepped(area / ideal_width, step)
        error_by_width = _aspect_error((by_width, _stepped(by_width / aspect, step)), aspect)
        error_by_height = _aspect_error((_stepped(by_height * aspect, step), by_height), aspect)
        if error_by_width < error_by_height:
            width, height = by_width, int(by_width / aspect + 0.5)
        else:
            width, height = int(by_height * aspect + 0.5), by_height
    bucket = (width // step * step, height // step * step)
    if not all(bucket):
        message = f"{size[0]}x{size[1]} pixels leave no bucket with sides of at least {step} pixels"
        raise DataError(str(Problem("", message, "remove the image, or set bucket_no_upscale to false")))
    return ResizeCrop((width, height), bucket)


def _stepped(side: float, step: int) -> int:
    return int(side + 0.5) // step * step


def _aspect_error(size: Size, aspect: float) -> float:
    return abs(size[0] / size[1] - aspect) if all(size) else inf
