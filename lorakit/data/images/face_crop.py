"""Faces: where the names of files say that they are, and crops around them; imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from attrs import frozen

from lorakit.data.images.buckets import ResizeCrop, Size
from lorakit.errors import DataError, Problem

JITTER = 20
"""A crop whose size varies is off the middle of the face by up to this part of the face."""


@frozen
class Face:
    """A face in an image; all in pixels of the whole image."""

    center: Size
    """How far its middle is from the left and the top."""
    side: int
    """Its width or height, whichever is longer."""
    image: Size
    """Width and height of the image."""


def face_named(path: Path, size: Size) -> Face:
    """The face in an image of this size that the file's name ends with: `…_x_y_width_height.png`.

    Raises DataError if the name contains none, or one outside the image.
    """
    parts = path.stem.split("_")
    numbers = [int(part) for part in parts[-4:] if part.isascii() and part.isdecimal()]
    if len(parts) < 5 or len(numbers) < 4:
        hint = "name it so, or put it into a subset without face_crop_aug_range"
        message = "does not give the position of the face: its name must end with _x_y_width_height, in pixels"
        raise DataError(str(Problem(str(path), message, hint)))
    x, y, width, height = numbers
    if x >= size[0] or y >= size[1] or not (width and height):
        message = f"names a face of {width}x{height} pixels around ({x}, {y}), in an image of {size[0]}x{size[1]}"
        raise DataError(str(Problem(str(path), message, "the numbers refer to the image after EXIF rotation")))
    return Face((x, y), max(width, height), size)


def stem_without_face(path: Path) -> str:
    """The file's name without extension and without the numbers of the face."""
    return path.stem.rsplit("_", 4)[0]


def around_face(
    face: Face, bucket: Size, times: tuple[float, float], generator: np.random.Generator, anywhere: bool
) -> ResizeCrop:
    """A crop of the bucket's size whose shorter side is between two `times` the face's longer one.

    The image is enlarged only where it is smaller than the bucket, and always covers it, which may keep the face
    smaller or larger than that. The face is in the middle of the crop, give or take a little where its size varies;
    or `anywhere`, near the middle more often. Near a border the crop ends there.
    """
    covering = max(bucket[0] / face.image[0], bucket[1] / face.image[1])
    low, high = (
        min(max(min(bucket) / (face.side * factor), covering), max(covering, 1.0)) for factor in reversed(times)
    )
    scale = generator.uniform(low, high)
    width, height = (max(int(side * scale + 0.5), least) for side, least in zip(face.image, bucket, strict=True))
    jitter = int(face.side * scale / JITTER) if times[0] != times[1] else 0
    crop_xy = []
    for side, own, center in zip((width, height), bucket, face.center, strict=True):
        middle = int(center * scale + 0.5)
        reach = max(side - middle, middle)
        off = generator.integers(0, reach, 2, endpoint=True).sum() - reach if anywhere else 0
        off += generator.integers(-jitter, jitter, endpoint=True) if jitter and not anywhere else 0
        crop_xy.append(int(min(max(middle - own // 2 + off, 0), side - own)))
    return ResizeCrop((width, height), bucket, (crop_xy[0], crop_xy[1]))
