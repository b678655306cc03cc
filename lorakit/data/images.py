"""Images: their size as seen, and their pixels as the image encoder takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from lorakit.data.buckets import Placement, Size
from lorakit.errors import DataError, Problem

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
"""Extensions, in lower case, of the files that are taken for images."""

# Files are often misnamed, so the format is told by the content; Pillow's other readers stay shut to untrusted files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_size(path: Path) -> Size:
    """Width and height of an image as it is seen, that is after EXIF rotation; reads only the file's header.

    Raises DataError where the file is no image that can be read.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def load_pixels(path: Path, placement: Placement) -> NDArray[np.uint8]:
    """The pixels of an image brought to its bucket, RGB [H, W, 3], upright and on white.

    Resampled with Pillow's Lanczos, whose window grows when an image shrinks: it keeps more detail than
    area averaging and lets through less of what would alias, and it is as good for enlarging.

    Raises DataError where the file is damaged.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        flat = _on_white(image)
        upright = flat.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else flat
    return np.asarray(_resized_crop(upright, placement))


def _resized_crop(image: Image.Image, placement: Placement) -> Image.Image:
    """The centre of the resized image; what would be cropped away is never computed."""
    (width, height), (bucket_width, bucket_height) = placement.resized, placement.bucket
    left, top = (width - bucket_width) // 2, (height - bucket_height) // 2
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + bucket_width) * across, (top + bucket_height) * down)
    inside = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    return image.resize(placement.bucket, Image.Resampling.LANCZOS, box=inside)


def _on_white(image: Image.Image) -> Image.Image:
    """The image in RGB; what is transparent shows white, and 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey[grey == clear] = 65535
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the file gives none that makes sense."""
    try:
        # The PNG reader's own `getexif` would decode all pixels to look for a tag behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises whatever it stumbles over, and an image is good without its tags.
        return 1
    return orientation if orientation in _TO_UPRIGHT else 1


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An open image; whatever goes wrong while it is used is a DataError that names the file."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise many types for damaged files.
        raise DataError(str(_why_unreadable(path, error))) from error


def _why_unreadable(path: Path, error: Exception) -> Problem:
    name = str(path)
    if isinstance(error, Image.DecompressionBombError):
        return Problem(name, "has more pixels than is sane, which may be an attack", "shrink or remove it")
    if isinstance(error, OSError) and error.strerror:
        return Problem(name, f"cannot be read: {error.strerror}")
    if path.stat().st_size == 0:
        return Problem(name, "is empty (0 bytes)", "restore or remove it")
    if isinstance(error, UnidentifiedImageError):
        return Problem(name, "is not a PNG, JPEG, WebP, BMP or GIF image", "convert or remove it")
    return Problem(name, f"is damaged: {error}", "replace or remove it")
