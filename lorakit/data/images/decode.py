"""Images: their size as seen, and their pixels as the image encoder takes them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from lorakit.config.datasets import Interpolation
from lorakit.data.images.area import area_mean
from lorakit.data.images.buckets import ResizeCrop, Size
from lorakit.data.images.formats import FORMATS, NAMES, disguised, has_its_end, read_ends
from lorakit.errors import DataError, Problem
from lorakit.utils.safe_paths import require_regular_file

# Pillow's warnings name no file. The errors here say what is wrong with a file; up to twice the number of pixels
# that it warns of, images are read.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

RESAMPLING: Mapping[Interpolation, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
"""Pillow's filters, all but the nearest with a window that grows when an image shrinks. `area` is one for enlarging."""

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_WITH_FRAMES = ("PNG", "WEBP", "AVIF", "TIFF", "GIF")
"""Formats whose files may be animated, or have pages. Further images in JPEG files are depth or brightness maps."""

_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
    | {"I", "I;16", "I;16L", "I;16B", "I;16N"}
)
"""Pillow's modes of pixels that are read."""


class ImageFacts(NamedTuple):
    """What is known of an image file that was not decoded."""

    width: int
    """Width in pixels, as the image is seen, that is after EXIF rotation."""
    height: int
    """Height in pixels, likewise."""
    has_frames: bool
    """Whether it is animated or has several pages, of which the first is used."""
    length: int
    """Bytes of the file."""
    ending: int
    """A number of its last bytes, the same for equal files and hardly for others."""

    @property
    def size(self) -> Size:
        """Width and height."""
        return self.width, self.height


def inspect_image(path: Path) -> ImageFacts:
    """What the header of an image file says; decodes the image only where the end of the file looks wrong.

    Raises DataError where the file is no image that can be read, or was cut off.
    """
    with _opened(path) as image:
        width, height = image.size
        upright = (height, width) if _orientation(image) >= 5 else (width, height)
        has_frames = image.format in _WITH_FRAMES and bool(getattr(image, "is_animated", False))
        ends = read_ends(path)
        if not has_its_end(path, image, ends):
            image.draft("L", (1, 1))  # which lets JPEG files be decoded at an eighth of their size
            image.load()
        return ImageFacts(*upright, has_frames, ends.length, crc32(ends.tail))


def load_pixels(path: Path, placement: ResizeCrop, interpolation: Interpolation = "lanczos") -> NDArray[np.uint8]:
    """The pixels of an image brought to its bucket, RGB [H, W, 3], upright and on white.

    Resampled by default with Pillow's Lanczos, whose window grows when an image shrinks: it keeps more detail
    than area averaging and lets through less of what would alias, and it is as good for enlarging.

    Raises DataError where the file is damaged.
    """
    return _resized_crop(_upright(path, _on_white), placement, interpolation)


def load_with_alpha(
    path: Path, placement: ResizeCrop, interpolation: Interpolation = "lanczos"
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Pixels of an image as they would be without transparency, [H, W, 3], and how opaque each is, [H, W].

    The latter is None if the file has no transparency. Raises DataError where the file is damaged.
    """
    picture = _upright(path, _with_alpha)
    # Colours and alpha apart, because Pillow resamples what is transparent as black.
    alpha = _resized_crop(picture.getchannel("A"), placement, interpolation) if picture.mode == "RGBA" else None
    return _resized_crop(picture.convert("RGB"), placement, interpolation), alpha


def load_upright(path: Path) -> Image.Image:
    """A whole image as it is seen, on white, in RGB. Raises DataError where the file is damaged."""
    return _upright(path, _on_white)


def load_small(path: Path, side: int) -> Image.Image:
    """An image as it is seen, on white, in RGB; JPEG files are decoded to as few pixels as `side` allows, both ways.

    Raises DataError where the file is damaged.
    """

    def on_white(image: Image.Image) -> Image.Image:
        image.draft("RGB", (side, side))
        return _on_white(image)

    return _upright(path, on_white)


def load_mask(path: Path, placement: ResizeCrop, interpolation: Interpolation = "lanczos") -> NDArray[np.uint8]:
    """The red channel of an image brought to its bucket, [H, W], upright. Raises DataError where it is damaged."""
    red = _upright(path, lambda image: _in_eight_bits(image).convert("RGB").getchannel("R"))
    return _resized_crop(red, placement, interpolation)


def _upright(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A decoded and converted image as it is seen."""
    with _opened(path) as image:
        orientation = _orientation(image)
        flat = convert(image)
    return flat.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else flat


def _resized_crop(image: Image.Image, placement: ResizeCrop, interpolation: Interpolation) -> NDArray[np.uint8]:
    """A part of the resized image; what would be cropped away is never computed."""
    (width, height), (bucket_width, bucket_height) = placement.resized, placement.bucket
    left, top = placement.crop_xy
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + bucket_width) * across, (top + bucket_height) * down)
    inside = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    if interpolation == "area" and min(across, down) >= 1:
        return area_mean(np.asarray(image), placement.bucket, inside)
    return np.asarray(image.resize(placement.bucket, RESAMPLING[interpolation], box=inside))


def filter_name(interpolation: Interpolation) -> str:
    """The same for all names of a filter."""
    return "AREA" if interpolation == "area" else RESAMPLING[interpolation].name


def _on_white(image: Image.Image) -> Image.Image:
    """The image in RGB; what is transparent shows white."""
    picture = _with_alpha(image)
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _with_alpha(image: Image.Image) -> Image.Image:
    """The image in RGBA, or in RGB if it has no transparency."""
    flat = _in_eight_bits(image)
    if not image.has_transparency_data:
        return flat.convert("RGB")
    if flat is image:
        return image.convert("RGBA")
    clear = image.info.get("transparency")
    opaque = np.asarray(image) != (clear if isinstance(clear, int) else -1)
    picture = flat.convert("RGB")
    picture.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return picture


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, or, where it is grey of 16 bits, scaled to 8."""
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the file gives none that makes sense."""
    if image.format == "TIFF":  # whose reader turns the image itself
        return 1
    try:
        # The PNG reader's own `getexif` would decode all pixels to look for a tag behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises whatever it stumbles over, and an image is good without its tags.
        return 1
    return orientation if orientation in _TO_UPRIGHT else 1


class _UnreadColours(Exception):
    """An image whose pixels are of a mode that is not read."""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An open image; whatever goes wrong while it is used is a DataError that names the file."""
    try:
        require_regular_file(path)
        with Image.open(path, formats=FORMATS) as image:
            if image.mode not in _MODES:
                raise _UnreadColours(image.mode)
            yield image
    except Exception as error:  # Pillow's decoders raise many types for damaged files.
        raise DataError(str(_why_unreadable(path, error))) from error


def _why_unreadable(path: Path, error: Exception) -> Problem:
    name = str(path)
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        pixels = re.search(r"\d+", str(error))
        has = f"has {int(pixels[0]) / 1e6:.0f} megapixels" if pixels else "has too many pixels"
        return Problem(name, f"{has}; at most {most:.0f} are read", "make it smaller, or remove it")
    if isinstance(error, OSError) and error.strerror:
        return Problem(name, f"cannot be read: {error.strerror}")
    if path.stat().st_size == 0:
        return Problem(name, "is empty", "restore or remove it")
    hint = "convert it to JPEG or PNG, or remove it"
    if isinstance(error, _UnreadColours):
        return Problem(name, f"has an unsupported colour mode, {error}", hint)
    disguise = disguised(path)
    if disguise or isinstance(error, UnidentifiedImageError):
        return Problem(name, disguise or f"is not a {NAMES} image", hint)
    return Problem(name, f"is damaged: {error}", "replace or remove it")
