"""The image files of a dataset, as the sources of its subsets list them; imports no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from attrs import frozen

from lorakit.api.dataset_source import SourceImage
from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.images.masks import find_masks
from lorakit.data.sources.folders import FolderSource
from lorakit.data.sources.metadata_files import MetadataFileSource
from lorakit.errors import DataError
from lorakit.plugins.build import build_component
from lorakit.plugins.failures import plugin_errors


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
        masks = find_masks(folder, [item.image for item in listed], problems) if folder else {}
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
