"""The validation split: images that are held out from training, to measure the loss on; imports no torch.

Which ones depends on the seed, the share and the names of the files alone, so it is the same on every
machine and in every process, and changes little when images are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from lorakit.config.datasets import DatasetConfig
from lorakit.errors import data_error
from lorakit.utils.rng import derived_seed

if TYPE_CHECKING:
    from lorakit.data.index import Example


Examples = list[list["Example"]]
"""Examples by the numbers of their datasets."""


def split_off(datasets: Sequence[DatasetConfig], examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """The examples to train on, and those that are held out, as they are validated.

    An image file that is held out in one subset is not trained on in any other, and validated in all of
    them but regularisation subsets. `seed` is for datasets that have none of their own. Raises DataError
    where a dataset has no image left to train on.
    """
    held_out: set[Path] = set()
    for dataset, own in zip(datasets, examples, strict=True):
        if dataset.validation_split:
            held_out |= _chosen(dataset, own, seed)
    if not held_out:
        return examples, [[] for _ in examples]
    is_out = [[example.image.resolve() in held_out for example in own] for own in examples]
    pairs = [list(zip(own, flags, strict=True)) for own, flags in zip(examples, is_out, strict=True)]
    training = [[example for example, out in own if not out] for own in pairs]
    _refuse_empty(datasets, training)
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


def _refuse_empty(datasets: Sequence[DatasetConfig], training: Examples) -> None:
    empty = [
        f"{', '.join(subset.place for subset in dataset.subsets)}: all images are held out for validation"
        " in other subsets, so none is left to train on; lower validation_split"
        for dataset, own in zip(datasets, training, strict=True)
        if dataset.active_subsets and all(example.subset.is_reg for example in own)
    ]
    if empty:
        raise data_error(empty)
