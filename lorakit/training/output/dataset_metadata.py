"""The metadata of a LoRA file about the images and captions that it was trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.config.table_reader import field_names
from lorakit.data.index import Example, IndexedDataset

_SUBSET_KEYS = [
    key
    for key in field_names(SubsetConfig)
    if key not in ("image_dir", "metadata_file", "source", "caption_extension", "conditioning_data_dir")
]
_OF_ONE_SUBSET = ("num_repeats", "class_tokens", "is_reg")
_DATASET_KEYS = [key for key in field_names(DatasetConfig) if key not in ("subsets", "resolution", "batch_size")]


def data_metadata(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """The entries about the data.

    Keys whose value all datasets and subsets share have entries of their name; `ss_datasets` has all of each.
    """
    first = datasets[0].config
    width, height = first.resolution
    examples = [example for dataset in datasets for example in dataset.examples]
    subsets = [subset for dataset in datasets for subset in dataset.config.active_subsets]
    return {
        **_shared(subsets, [key for key in _SUBSET_KEYS if key not in _OF_ONE_SUBSET]),
        **_shared([dataset.config for dataset in datasets], _DATASET_KEYS),
        "ss_num_train_images": _appearances(examples, is_reg=False),
        "ss_num_reg_images": _appearances(examples, is_reg=True),
        "ss_resolution": (width, height),
        "modelspec.resolution": f"{width}x{height}",
        "ss_batch_size_per_device": first.batch_size,
        "ss_bucket_info": json.dumps(_bucket_info(examples)),
        "ss_dataset_dirs": json.dumps(_folders(datasets, is_reg=False)),
        "ss_reg_dataset_dirs": json.dumps(_folders(datasets, is_reg=True)),
        "ss_tag_frequency": json.dumps(_tag_frequency(examples)),
        "ss_datasets": json.dumps([_dataset_description(dataset) for dataset in datasets]),
    }


def _shared(configs: Sequence[Any], keys: Sequence[str]) -> dict[str, Any]:
    """The values of those keys that all configs have the same value for."""
    first, *others = configs
    agreed = (key for key in keys if all(getattr(other, key) == getattr(first, key) for other in others))
    return {f"ss_{key}": getattr(first, key) for key in agreed}


def _subsets(datasets: Sequence[IndexedDataset]) -> Iterator[tuple[SubsetConfig, int]]:
    """Each subset with the number of its images."""
    for dataset in datasets:
        counts = Counter(example.subset for example in dataset.examples)
        for subset in dataset.config.active_subsets:
            yield subset, counts[subset]


def _folders(datasets: Sequence[IndexedDataset], is_reg: bool) -> dict[str, dict[str, int]]:
    """Repeats and images of each folder; one that was met before gets a number behind its name."""
    folders: dict[str, dict[str, int]] = {}
    for subset, images in _subsets(datasets):
        if subset.is_reg is is_reg:
            name, number = subset.image_dir.name, 1
            while name in folders:
                number += 1
                name = f"{subset.image_dir.name} ({number})"
            folders[name] = {"n_repeats": subset.num_repeats, "img_count": images}
    return folders


def _tag_frequency(examples: Sequence[Example]) -> dict[str, Counter[str]]:
    """How often each tag is in the captions of each folder."""
    frequency: dict[str, Counter[str]] = {}
    for example in examples:
        tags = (tag.strip().lower() for tag in re.split("[,\n]", example.caption))
        frequency.setdefault(example.subset.image_dir.name, Counter()).update(filter(None, tags))
    return frequency


def _bucket_info(examples: Sequence[Example]) -> Mapping[str, Any]:
    """Size and images of each bucket, repeats counted, and how far the images' shapes are from them in the mean."""
    counts: Counter[tuple[int, int]] = Counter()
    for example in examples:
        counts[example.placement.bucket] += example.repeats
    buckets = {
        str(index): {"resolution": list(size), "count": count}
        for index, (size, count) in enumerate(sorted(counts.items()))
    }
    # How much the width of an image and that of its bucket differ, in heights.
    shapes = ((*example.placement.resized, *example.placement.bucket) for example in examples)
    errors = [
        abs(bucket_width / bucket_height - width / height) for width, height, bucket_width, bucket_height in shapes
    ]
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(len(errors), 1)}


def _dataset_description(dataset: IndexedDataset) -> Mapping[str, Any]:
    config = dataset.config
    return {
        "is_dreambooth": not any(subset.metadata_file or subset.source for subset in config.subsets),
        "batch_size_per_device": config.batch_size,
        "num_train_images": _appearances(dataset.examples, is_reg=False),
        "num_reg_images": _appearances(dataset.examples, is_reg=True),
        "resolution": list(config.resolution),
        **{key: getattr(config, key) for key in _DATASET_KEYS},
        "tag_frequency": _tag_frequency(dataset.examples),
        "bucket_info": _bucket_info(dataset.examples),
        "subsets": [
            {
                "img_count": images,
                **{key: getattr(subset, key) for key in _SUBSET_KEYS},
                "image_dir": subset.image_dir.name,
                **({"metadata_file": subset.metadata_file.name} if subset.metadata_file else {}),
            }
            for subset, images in _subsets([dataset])
        ],
    }


def _appearances(examples: Sequence[Example], is_reg: bool) -> int:
    """How often the regularisation images, or the others, appear in an epoch."""
    return sum(example.repeats for example in examples if example.subset.is_reg is is_reg)
