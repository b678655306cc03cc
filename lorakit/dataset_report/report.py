"""The report on a dataset: its images one by one as training uses them, and what they have in common.

Imports no torch, and changes nothing but what the cache remembers of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

from attrs import frozen

from lorakit.config.train_config import TrainConfig
from lorakit.data.cache.store import Cache
from lorakit.data.captions import longest_captions
from lorakit.data.images.buckets import Size
from lorakit.data.index import Example, IndexedDataset, index_datasets
from lorakit.data.review import review
from lorakit.dataset_report.alike import AlikeImages, find_alike
from lorakit.dataset_report.tags import Misspelling, TagCount, count_tags, misspellings, tags_of
from lorakit.errors import Problem


@frozen(kw_only=True)
class ImageReport:
    """An image as training uses it."""

    example: Example
    """The image with its caption and subset."""
    caption: str
    """The caption with all that options add to it, as long as it can be."""
    tokens: int | None
    """Tokens of that caption; None where the model family does not count them."""
    held_out: bool
    """Whether it is held out for validation."""

    @property
    def path(self) -> Path:
        """The image file."""
        return self.example.image

    @property
    def size(self) -> Size:
        """Width and height of the image in pixels, as it is seen."""
        return self.example.size

    @property
    def bucket(self) -> Size:
        """Width and height that it is trained at."""
        return self.example.placement.bucket

    @property
    def appearances(self) -> int:
        """How often it is trained on in an epoch."""
        return 0 if self.held_out else self.example.repeats

    @property
    def cropped(self) -> float | None:
        """The share of it that is cropped away; None where the crop is made around a face, and varies."""
        if self.example.face is not None:
            return None
        return 1 - prod(self.bucket) / prod(self.example.placement.resized)

    @property
    def enlarged(self) -> float:
        """How many times as wide it becomes; below 1 where it is reduced."""
        return self.example.placement.resized[0] / self.size[0]

    @property
    def is_cropped(self) -> bool:
        """Whether half a percent of it or more is cropped away."""
        return self.cropped is not None and self.cropped >= 0.005

    @property
    def is_enlarged(self) -> bool:
        """Whether it becomes 5% wider or more."""
        return self.enlarged >= 1.05

    @property
    def has_caption(self) -> bool:
        """Whether it has a caption of its own, though that may be empty."""
        return self.example.source is not None and self.example.source.caption is not None


@frozen(kw_only=True)
class SubsetReport:
    """The images of a subset."""

    place: str
    """Where they are: the folder, the metadata file or the source."""
    dataset: int
    """The number of the dataset that the subset is in, from 0."""
    is_reg: bool
    """Whether they are regularisation images."""
    images: tuple[ImageReport, ...]
    """Those that are used, sorted by name; none where `num_repeats` is 0."""

    @property
    def by_bucket(self) -> dict[Size, list[ImageReport]]:
        """The images by their buckets, smaller ones first."""
        found: dict[Size, list[ImageReport]] = {}
        for image in self.images:
            found.setdefault(image.bucket, []).append(image)
        return dict(sorted(found.items()))

    def select(self, wanted: Callable[[ImageReport], bool]) -> list[ImageReport]:
        """The images of which something is true."""
        return [image for image in self.images if wanted(image)]


@frozen(kw_only=True)
class DataReport:
    """What is in the datasets of a config, and what training makes of it."""

    subsets: tuple[SubsetReport, ...]
    """The subsets of all datasets, in their order."""
    alike: AlikeImages
    """Images that are equal or nearly so, in all subsets together."""
    tags: tuple[TagCount, ...]
    """The tags of all captions, the most frequent first."""
    misspellings: tuple[Misspelling, ...]
    """Tags that may be misspelled."""
    token_limit: int | None
    """Tokens of a caption that are read; None where the model family does not count them."""
    warnings: tuple[Problem, ...]
    """What may not be meant, as `lorakit check` says it."""

    @property
    def images(self) -> list[ImageReport]:
        """All images; a file that is in several subsets is there as often."""
        return [image for subset in self.subsets for image in subset.images]

    def is_cut(self, image: ImageReport) -> bool:
        """Whether the end of an image's caption is not read."""
        return self.token_limit is not None and image.tokens is not None and image.tokens > self.token_limit


def report_data(config: TrainConfig) -> DataReport:
    """Look at all images and captions of a config. Raises DataError for folders and files that cannot be used."""
    memo = Cache(config.cache_dir).memo
    datasets = index_datasets(config.data.datasets, config.data.workers, memo, config.training.seed)
    examples = [example for dataset in datasets for example in (*dataset.examples, *dataset.held_out)]
    tags = tuple(count_tags(tags_of(example.caption, example.subset) for example in examples))
    subsets, limit = _subsets(config, datasets)
    found = DataReport(
        subsets=subsets,
        alike=find_alike(examples, memo, config.data.workers),
        tags=tags,
        misspellings=tuple(misspellings(tags)),
        token_limit=limit,
        warnings=tuple(review(datasets, memo)),
    )
    memo.save()
    return found


def _subsets(config: TrainConfig, datasets: Sequence[IndexedDataset]) -> tuple[tuple[SubsetReport, ...], int | None]:
    """The subsets with their images, and how many tokens of a caption are read."""
    pairs = [(own, held_out) for dataset in datasets for own, held_out in _examples(dataset)]
    captions = [max(longest_captions(own.caption, own.subset), key=len) for own, _ in pairs]
    lengths = config.model.caption_lengths(captions, config.data.weighted_captions)
    tokens: Sequence[int | None] = lengths.tokens if lengths else [None] * len(pairs)
    images: dict[str, list[ImageReport]] = {}
    for (example, held_out), caption, count in zip(pairs, captions, tokens, strict=True):
        made = ImageReport(example=example, caption=caption, tokens=count, held_out=held_out)
        images.setdefault("/".join(example.sample_id.split("/", 2)[:2]), []).append(made)
    subsets = tuple(
        SubsetReport(
            place=subset.place,
            dataset=number,
            is_reg=subset.is_reg,
            images=tuple(sorted(images.get(f"{number}/{place}", []), key=lambda image: image.example.sample_id)),
        )
        for number, dataset in enumerate(datasets)
        for place, subset in enumerate(dataset.config.subsets)
    )
    return subsets, lengths.limit if lengths else None


def _examples(dataset: IndexedDataset) -> list[tuple[Example, bool]]:
    """The examples of a dataset, each with whether it is held out."""
    return [(own, False) for own in dataset.examples] + [(own, True) for own in dataset.held_out]
