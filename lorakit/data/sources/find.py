"""The image files of a dataset, as the sources of its subsets list them, and their masks.

Imports no torch and opens none of the files.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from attrs import frozen

from lorakit.api.dataset_source import SourceImage
from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.images.formats import EXTENSIONS
from lorakit.data.sources.folders import FolderSource
from lorakit.data.sources.metadata_files import MetadataFileSource
from lorakit.errors import DataError, Problem
from lorakit.plugins.build import build_component
from lorakit.plugins.failures import plugin_errors
from lorakit.utils.safe_paths import list_files


@frozen
class FoundImage:
    """An image file that has not been opened."""

    image: Path
    """The image file."""
    caption: Path | str | None
    """The caption's file, or the caption itself."""
    dataset: DatasetConfig
    """The dataset that it belongs to."""
    subset: SubsetConfig
    """The subset that lists it."""
    sample_id: str
    """Key of its random draws: the numbers of dataset and subset, and its name; the same on every machine."""
    mask: Path | None
    """The file that says where its loss counts."""


def find_images(number: int, dataset: DatasetConfig, problems: list[str]) -> list[FoundImage]:
    """The image files of dataset `number`, subset by subset, sorted by name; problems are added to `problems`.

    Subsets that `num_repeats` switches off have none.
    """
    found = []
    for subset_number, subset in enumerate(dataset.subsets):
        if subset.num_repeats == 0:
            continue
        try:
            listed = _listed(subset, problems)
        except DataError as error:
            problems.append(str(error))
            continue
        folder = subset.conditioning_data_dir
        masks = _find_masks(folder, [item.image for item in listed], problems) if folder else {}
        for item in listed:
            # File names need not be valid text, but keys of random draws must be.
            text = item.name.encode("utf-8", "backslashreplace").decode()
            sample_id, mask = f"{number}/{subset_number}/{text}", masks.get(item.image.stem, item.mask)
            found.append(FoundImage(item.image, item.caption, dataset, subset, sample_id, mask))
    return found


def _listed(subset: SubsetConfig, problems: list[str]) -> list[SourceImage]:
    """What the source of a subset lists. Raises DataError, and PluginError where a plugin's source fails."""
    if subset.source is None:
        source = MetadataFileSource(subset) if subset.metadata_file else FolderSource(subset)
        return list(source.list_images(problems))
    source = build_component(subset.source, subset)
    with plugin_errors(subset.source, "list_images"):
        listed = list(source.list_images(problems))
        wrong = [item for item in listed if not isinstance(item, SourceImage)]
        if wrong:
            raise TypeError(f"it lists {wrong[0]!r}, not a SourceImage")
    counts = Counter(item.name for item in listed)
    twice = [name for name, count in counts.items() if count > 1]
    problems += [f"{subset.place}: {name} is listed twice; each image needs a different name" for name in twice]
    if not listed and not problems:
        raise DataError(f"{subset.place}: lists no images")
    return sorted(listed, key=lambda item: item.name)


def _find_masks(folder: Path, images: Collection[Path], problems: list[str]) -> Mapping[str, Path]:
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
