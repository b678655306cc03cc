"""What may not be meant with a dataset's images, although they can be used: warnings that count and name files.

Imports no torch and decodes no image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.cache.file_cache import FileStatCache, content_digest
from lorakit.data.images.buckets import Size
from lorakit.data.index import Example, IndexedDataset
from lorakit.data.review.captions import review_captions
from lorakit.data.sources.folders import kinds_of, unread_images
from lorakit.errors import Problem
from lorakit.utils.safe_paths import list_files
from lorakit.utils.wording import counted_in, shown_path, some, some_names

T = TypeVar("T")
KeyT = TypeVar("KeyT", bound=Hashable)

_ENLARGED = 2.0
"""How many times as large an image may become without a word."""
_KEPT = 0.5
"""How much of an image must be left after cropping."""


def review(datasets: Sequence[IndexedDataset], memo: FileStatCache | None = None) -> list[Problem]:
    """All that may not be meant, each thing once though it is the same in several datasets."""
    found: list[Problem] = []
    for dataset in datasets:
        examples = [*dataset.examples, *dataset.held_out]
        for number, own in _groups(examples, lambda example: example.sample_id.split("/", 2)[1]).items():
            subset = dataset.config.subsets[int(number)]
            names = [] if subset.metadata_file or subset.source else sorted(list_files(subset.image_dir))
            found += _unread_files(subset, names)
            found += review_captions(subset, own, names)
            found += _frames(subset, own)
            found += _sizes(dataset.config, subset, own)
        found += _equal_images(examples, memo)
        found += _settings(dataset)
    return list(dict.fromkeys(found))


def _unread_files(subset: SubsetConfig, names: Sequence[str]) -> Iterator[Problem]:
    unread = unread_images(names)
    if unread:
        kinds = f", {kinds_of(unread)}" if len(unread) > 3 else ""
        message = f"{counted_in(len(unread), 'file', subset.place)} not read{kinds}: {some(unread)}"
        yield Problem("", message, "convert images to JPEG or PNG")


def _frames(subset: SubsetConfig, examples: Sequence[Example]) -> Iterator[Problem]:
    several = [example.image for example in examples if example.source and example.source.image.has_frames]
    if several:
        message = f"several frames or pages, of which the first is used: {some_names(several)}"
        yield Problem("", f"{counted_in(len(several), 'image', subset.place, 'have')} {message}")


def _sizes(dataset: DatasetConfig, subset: SubsetConfig, examples: Sequence[Example]) -> Iterator[Problem]:
    """Images that are much enlarged, and those of which most is cropped away; crops that vary show all in the end."""
    if subset.face_crop_aug_range:
        return
    sizes = [(example, example.source.image.size) for example in examples if example.source]
    enlarged = [(example.placement.resized[0] / size[0], example.image, size) for example, size in sizes]
    enlarged = sorted((item for item in enlarged if item[0] > _ENLARGED), reverse=True)
    if enlarged:
        times, worst, (width, height) = enlarged[0]
        message = f"enlarged more than twice: {worst.name}, of {width}x{height} pixels, {times:.1f} times"
        hint = "use larger ones, or lower resolution"
        yield Problem("", f"{_of(enlarged, examples, subset)} {message}{_others(enlarged)}", hint)
    kept = [
        (_area(example.placement.bucket) / _area(example.placement.resized), example.image, size)
        for example, size in sizes
    ]
    kept = sorted(item for item in kept if item[0] < _KEPT)
    if kept and not subset.random_crop:
        share, worst, (width, height) = kept[0]
        message = f"cropped to less than half: {worst.name}, of {width}x{height} pixels, to {share:.0%}"
        hint = "crop them yourself" if dataset.enable_bucket else "set enable_bucket = true, or crop them yourself"
        yield Problem("", f"{_of(kept, examples, subset)} {message}{_others(kept)}", hint)


def _of(some_of: Sequence[object], examples: Sequence[Example], subset: SubsetConfig) -> str:
    return f"{len(some_of)} of {len(examples)} images in {subset.place} {'is' if len(some_of) == 1 else 'are'}"


def _others(items: Sequence[object]) -> str:
    return ", …" if len(items) > 1 else ""


def _area(size: Size) -> int:
    return size[0] * size[1]


def _equal_images(examples: Sequence[Example], memo: FileStatCache | None) -> Iterator[Problem]:
    """Files with the same bytes; only those of one length and with the same bytes at the end are read."""
    digest = memo.digest if memo else content_digest
    facts = {example.image: example.source.image for example in examples if example.source}
    groups: list[list[Path]] = []
    for alike in _groups(facts, lambda path: (facts[path].length, facts[path].ending)).values():
        if len(alike) > 1:
            groups += (same for same in _groups(alike, digest).values() if len(same) > 1)
    if groups:
        pairs = "; ".join(" = ".join(path.name for path in group[:3]) for group in groups[:3])
        count, folder = sum(len(group) - 1 for group in groups), shown_path(groups[0][0].parent)
        message = f"the same as another: {pairs}{'; …' if len(groups) > 3 else ''}"
        yield Problem("", f"{counted_in(count, 'image', folder)} {message}", "keep one; num_repeats repeats images")


def _settings(dataset: IndexedDataset) -> Iterator[Problem]:
    """A folder that is in several subsets, and a validation split without images."""
    config = dataset.config
    active = [subset for subset in config.subsets if subset.num_repeats and not (subset.metadata_file or subset.source)]
    for folder, subsets in _groups(active, lambda subset: subset.image_dir.resolve()).items():
        if len(subsets) > 1:
            message = (
                f"{shown_path(folder)} is in {len(subsets)} subsets of one dataset, so its images train as often more"
            )
            yield Problem("", message, "remove one of the subsets; num_repeats repeats images")
    if config.validation_split and not dataset.held_out:
        count = len(dataset.examples)
        message = f"of {config.validation_split:g} holds out none of {count} images: no subset has enough of them"
        yield Problem("data.validation_split", message)


def _groups(items: Iterable[T], key: Callable[[T], KeyT]) -> dict[KeyT, list[T]]:
    """The items by their keys, in their order."""
    groups: dict[KeyT, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
