"""Masks: which file says where an image's loss counts; imports no torch and decodes no image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from lorakit.data.images.buckets import Size
from lorakit.data.images.formats import EXTENSIONS
from lorakit.errors import DataError, Problem
from lorakit.utils.safe_paths import list_files


def find_masks(folder: Path, images: Collection[Path], problems: list[str]) -> Mapping[str, Path]:
    """The masks of images by their names without extension.

    That an image has none or several, or a mask no image, is added to the problems.
    """
    try:
        names = sorted(list_files(folder))
    except OSError as error:
        problems.append(str(Problem(str(folder), f"cannot be listed: {error.strerror}", "check conditioning_data_dir")))
        return {}
    found: dict[str, list[Path]] = defaultdict(list)
    for mask in (folder / name for name in names):
        if mask.suffix.lower() in EXTENSIONS:
            found[mask.stem].append(mask)
    wanted = {image.stem for image in images}
    hint = "each mask must have the name of an image, whatever its extension"
    without = [image for image in images if image.stem not in found]
    problems += [str(Problem(str(image), f"has no mask in {folder}", hint)) for image in without]
    for stem, masks in found.items():
        if stem not in wanted:
            problems += [str(Problem(str(mask), "is a mask without an image", hint)) for mask in masks]
        elif len(masks) > 1:
            listed = ", ".join(mask.name for mask in masks)
            problems.append(str(Problem(str(folder), f"has several masks of one name: {listed}", "keep one of them")))
    return {stem: masks[0] for stem, masks in found.items()}


def check_size(mask: Path, size: Size, image: Path, image_size: Size) -> None:
    """Raise DataError where a mask has another size than its image."""
    if size != image_size:
        message = f"has {size[0]}x{size[1]} pixels, its image {image} {image_size[0]}x{image_size[1]}"
        raise DataError(str(Problem(str(mask), message, "a mask has the size of its image")))
