"""Examples: the images of a dataset with their captions and buckets, which of them train, and how often.

Imports no torch and decodes no image.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attrs import Factory, evolve, field, frozen

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.cache.file_cache import FileStatCache
from lorakit.data.cache.parallel import map_chunked
from lorakit.data.captions import caption_variants, read_caption
from lorakit.data.images.buckets import ResizeCrop, Size, assign_bucket
from lorakit.data.images.decode import ImageFacts, inspect_image
from lorakit.data.images.face_crop import Face, face_named
from lorakit.data.sources.find import FoundImage, find_images
from lorakit.errors import DataError, Problem, data_error
from lorakit.utils.rng import derived_seed

log = logging.getLogger(__name__)

_READERS = 8
"""Threads that read headers and captions if the user does not say: they wait for the disk, not for a core."""


@frozen
class Source:
    """What an example was made from."""

    image: ImageFacts
    """What is known of the image file."""
    caption: Path | str | None
    """The caption's file, or the caption where it is of a metadata file; None where the image has none."""
    has_more_lines: bool = False
    """Whether the caption file has lines that are not used."""


@frozen
class Example:
    """An image with its caption."""

    image: Path
    """The image file."""
    caption: str
    """Its caption, as written; with `enable_wildcard` it may have several lines."""
    subset: SubsetConfig
    """How it is used."""
    placement: ResizeCrop
    """How it is brought to the size of its bucket."""
    sample_id: str
    """Key of its random draws: the numbers of dataset and subset, and the file's name; the same on every machine."""
    repeats: int = field(default=Factory(lambda self: self.subset.num_repeats, takes_self=True))
    """How often it appears in an epoch."""
    mask: Path | None = None
    """The file that says where its loss counts."""
    face: Face | None = None
    """The face that it is to be cropped around."""
    source: Source | None = field(default=None, eq=False)
    """What it was made from; None if not from files."""

    @property
    def size(self) -> Size:
        """The image's own size in pixels as it is seen, before it is resized."""
        return self.source.image.size if self.source else self.placement.resized

    @property
    def is_augmented(self) -> bool:
        """Whether its pixels change from epoch to epoch, mirroring apart, so that it cannot be encoded once for all."""
        is_cropped = self.subset.random_crop and self.placement.resized != self.placement.bucket
        return self.subset.color_aug or is_cropped or self.face is not None


@frozen
class IndexedDataset:
    """A dataset and all that is in it."""

    config: DatasetConfig
    """What was asked for."""
    examples: tuple[Example, ...]
    """Its images, subset by subset, each sorted by name; no more regularisation images than are used."""
    held_out: tuple[Example, ...] = ()
    """Images that are validated and not trained on, as `validation_split` says."""


def default_workers() -> int:
    """How many threads read images if the user does not say: one per processor core, at most 8."""
    return min(os.cpu_count() or 1, 8)


def index_datasets(
    datasets: Sequence[DatasetConfig], workers: int | None = None, memo: FileStatCache | None = None, seed: int = 0
) -> tuple[IndexedDataset, ...]:
    """The datasets with all their examples, sizes and captions taken from the memo where it knows them.

    `seed` chooses what is held out of datasets without a validation seed of their own. Raises one DataError
    for all folders and files that cannot be used.
    """
    problems: list[str] = []
    found = [find_images(number, dataset, problems) for number, dataset in enumerate(datasets)]
    with ThreadPoolExecutor(workers or _READERS) as pool:
        read = [list(map_chunked(pool, lambda file: _read(file, memo), files)) for files in found]
    problems += [outcome for outcomes in read for outcome in outcomes if isinstance(outcome, str)]
    if problems:
        raise data_error(problems)
    examples = [[outcome for outcome in outcomes if isinstance(outcome, Example)] for outcomes in read]
    parts = zip(datasets, *_split_off(datasets, examples, seed), strict=True)
    return tuple(IndexedDataset(dataset, _balanced(own), tuple(held_out)) for dataset, own, held_out in parts)


def has_dynamic_captions(datasets: Sequence[IndexedDataset]) -> bool:
    """Whether any caption takes more forms than can be listed, so that captions cannot be encoded once for all."""
    examples = (example for dataset in datasets for example in dataset.examples)
    return any(caption_variants(example.caption, example.subset) is None for example in examples)


def has_augmentation(datasets: Sequence[IndexedDataset]) -> bool:
    """Whether the pixels of any image change from epoch to epoch, so that it cannot be encoded once for all."""
    return any(example.is_augmented for dataset in datasets for example in dataset.examples)


_Examples = list[list[Example]]
"""Examples by the numbers of their datasets."""


def _split_off(datasets: Sequence[DatasetConfig], examples: _Examples, seed: int) -> tuple[_Examples, _Examples]:
    """The examples to train on, and those that are held out, as they are validated; by dataset.

    Which ones depends on the seed, the share and the names of the files alone, so it is the same on every machine and
    in every process, and changes little when images are added. An image file that is held out in one subset is not
    trained on in any other, and validated in all of them but regularisation subsets. `seed` is for datasets that have
    none of their own. Raises DataError where a dataset has no image left to train on.
    """
    held_out: set[Path] = set()
    for dataset, own in zip(datasets, examples, strict=True):
        if dataset.validation_split:
            held_out |= _chosen(dataset, own, seed)
    if not held_out:
        return examples, [[] for _ in examples]
    pairs = [[(example, example.image.resolve() in held_out) for example in own] for own in examples]
    training = [[example for example, out in own if not out] for own in pairs]
    empty = [
        f"{', '.join(subset.place for subset in dataset.subsets)}: all images are held out for validation"
        " in other subsets, so none is left to train on; lower validation_split"
        for dataset, own in zip(datasets, training, strict=True)
        if dataset.active_subsets and all(example.subset.is_reg for example in own)
    ]
    if empty:
        raise data_error(empty)
    return training, [[_validated(own) for own, out in each if out and not own.subset.is_reg] for each in pairs]


def _chosen(dataset: DatasetConfig, examples: Sequence[Example], seed: int) -> set[Path]:
    """The files that a dataset holds out: of each subset the round(n · share) with the smallest keyed numbers.

    At least one image of a subset stays. The numbers do not depend on the subset, so that a folder in several
    is split alike in all.
    """
    own_seed = dataset.seed_of_validation(seed)
    subsets: dict[str, list[tuple[int, Path]]] = {}
    for example in examples:
        _, subset, name = example.sample_id.split("/", 2)
        if not example.subset.is_reg:
            subsets.setdefault(subset, []).append((derived_seed(own_seed, "validation", name), example.image))
    return {
        image.resolve()
        for files in subsets.values()
        for _, image in sorted(files)[: min(round(len(files) * dataset.validation_split), len(files) - 1)]
    }


def _validated(example: Example) -> Example:
    """The example with nothing left that varies it from epoch to epoch."""
    still = evolve(
        example.subset,
        num_repeats=1,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
    )
    return evolve(example, subset=still, repeats=1, face=None)


def _balanced(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples, the regularisation images among them with their repeats; those that are not used left out."""
    regularising = [example for example in examples if example.subset.is_reg]
    training = sum(example.repeats for example in examples if not example.subset.is_reg)
    repeats = balanced_repeats([example.repeats for example in regularising], training)
    if 0 in repeats:
        used = len(repeats) - repeats.count(0)
        log.info("using %d of %d regularisation images, enough to match the training images", used, len(repeats))
    of_regularising = iter(repeats)
    counted = (evolve(own, repeats=next(of_regularising)) if own.subset.is_reg else own for own in examples)
    return tuple(example for example in counted if example.repeats)


def balanced_repeats(own: Sequence[int], wanted: int) -> list[int]:
    """How often each regularisation image appears in an epoch, given its own repeats and how many are wanted.

    Images are taken one after another, each with its own repeats, until there are as many as wanted or
    more; the rest is not used. If all are too few, they are repeated once more in turn until there are
    exactly as many as wanted.
    """
    repeats: list[int] = []
    taken = 0
    for count in own:
        repeats.append(count if taken < wanted else 0)
        taken += repeats[-1]
    if not own or taken >= wanted:
        return repeats
    more, rest = divmod(wanted - taken, len(own))
    return [count + more + (place < rest) for place, count in enumerate(repeats)]


def _read(file: FoundImage, memo: FileStatCache | None) -> Example | str:
    """The example, or what is wrong with it."""
    facts_of, lines_of = (memo.image, memo.caption) if memo else (inspect_image, read_caption)
    try:
        facts = facts_of(file.image)
        if file.mask:
            (width, height), size = facts_of(file.mask).size, facts.size
            if (width, height) != size:
                message = f"has {width}x{height} pixels, its image {file.image} {size[0]}x{size[1]}"
                raise DataError(str(Problem(str(file.mask), message, "a mask has the size of its image")))
        face = face_named(file.image, facts.size) if file.subset.face_crop_aug_range else None
        written = lines_of(file.caption) if isinstance(file.caption, Path) else file.caption
    except DataError as error:
        return str(error)
    try:
        placement = assign_bucket(facts.size, file.dataset)
    except DataError as error:
        return f"{file.image}: {error}"
    caption = (file.subset.class_tokens or "") if written is None else written
    used = caption if file.subset.enable_wildcard else caption.partition("\n")[0]
    source = Source(facts, None if written is None else file.caption, has_more_lines=used != caption)
    return Example(file.image, used, file.subset, placement, file.sample_id, mask=file.mask, face=face, source=source)
