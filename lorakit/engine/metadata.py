"""What a LoRA file says about its training, in the keys that webuis and sd-scripts read.

All values are text; numbers and truth values as Python prints them, structures as JSON. The keys
that are read, and by whom, are listed in the file format's documentation (`docs/reference/files.md`).
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from attrs import asdict

import lorakit
from lorakit.config.datasets import SubsetConfig
from lorakit.config.loss import LossSection
from lorakit.config.sections import TrainConfig
from lorakit.config.tables import field_names
from lorakit.data.examples import Example, IndexedDataset

KOHYA_MODULE = "networks.lora"
"""The name that tools know LoRA networks by."""

_SUBSET_KEYS = [
    key for key in field_names(SubsetConfig) if key not in ("image_dir", "metadata_file", "caption_extension")
]


def run_metadata(config: TrainConfig, datasets: Sequence[IndexedDataset], started: float) -> dict[str, str]:
    """The metadata that stays the same over a run; `started` is in seconds since 1970."""
    examples = [example for dataset in datasets for example in dataset.examples]
    values = {
        **_training_values(config),
        **_loss_values(config.loss),
        **_network_values(config),
        **_dataset_values(datasets),
        "ss_training_started_at": started,
        "ss_output_name": config.output.name,
        "ss_num_train_images": _appearances(examples, is_reg=False),
        "ss_num_reg_images": _appearances(examples, is_reg=True),
        "ss_prior_loss_weight": config.data.prior_loss_weight,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.output.name,
        "modelspec.implementation_version": f"lorakit/{lorakit.__version__}",
    }
    if config.output.training_comment is not None:
        values["ss_training_comment"] = config.output.training_comment
    return {key: str(value) for key, value in values.items()}


def save_metadata(step: int, epoch: int) -> dict[str, str]:
    """The metadata of one save."""
    now = time.time()
    return {
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_training_finished_at": str(now),
        "modelspec.date": datetime.fromtimestamp(now).isoformat(timespec="seconds"),
    }


def _training_values(config: TrainConfig) -> dict[str, Any]:
    training, optimizer = config.training, config.optimizer
    return {
        "ss_seed": training.seed,
        "ss_learning_rate": optimizer.lr,
        "ss_unet_lr": optimizer.lr_of("unet"),
        "ss_text_encoder_lr": optimizer.lr_of("text_encoder"),
        "ss_optimizer": optimizer.name,
        "ss_lr_scheduler": config.lr_scheduler.name,
        "ss_lr_warmup_steps": getattr(config.lr_scheduler, "warmup_steps", 0),
        "ss_max_grad_norm": training.max_grad_norm,
        "ss_max_train_steps": training.max_steps,
        "ss_num_epochs": training.max_epochs,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_mixed_precision": training.mixed_precision,
        "ss_fp8_base": {"unet", "text_encoder"} <= set(training.fp8_base),
        "ss_fp8_base_unet": training.fp8_base == ("unet",),
        "ss_cache_latents": True,
    }


def _loss_values(loss: LossSection) -> dict[str, Any]:
    """All options of the loss under the names that sd-scripts has for them."""
    values = {f"ss_{name}": value for name, value in asdict(loss).items()}
    return {**values, "ss_loss_type": values.pop("ss_type")}


def _network_values(config: TrainConfig) -> dict[str, Any]:
    network = config.network
    arguments = {
        "conv_dim": getattr(network, "conv_rank", None),
        "conv_alpha": getattr(network, "conv_alpha", None),
        "rank_dropout": getattr(network, "rank_dropout", None),
        "module_dropout": getattr(network, "module_dropout", None),
    }
    given = {key: str(value) for key, value in arguments.items() if value}
    return {
        "ss_network_module": KOHYA_MODULE,
        "ss_network_dim": getattr(network, "rank", None),
        "ss_network_alpha": getattr(network, "alpha", None),
        "ss_network_dropout": getattr(network, "dropout", None),
        **({"ss_network_args": json.dumps(given)} if given else {}),
    }


def _dataset_values(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    width, height = datasets[0].config.resolution
    buckets: Counter[tuple[int, int]] = Counter()
    folders: dict[str, dict[str, int]] = {}
    tags: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for example in dataset.examples:
            subset = example.subset
            buckets[example.placement.bucket] += example.repeats
            folder = subset.image_dir.name
            if not subset.is_reg:
                folders.setdefault(folder, {"n_repeats": subset.num_repeats, "img_count": 0})["img_count"] += 1
            counts = tags.setdefault(folder, {})
            for tag in filter(None, (part.strip().lower() for part in re.split("[,\n]", example.caption))):
                counts[tag] = counts.get(tag, 0) + 1
    bucket_info = {
        str(index): {"resolution": list(size), "count": count}
        for index, (size, count) in enumerate(sorted(buckets.items()))
    }
    return {
        "ss_resolution": (width, height),
        "modelspec.resolution": f"{width}x{height}",
        "ss_enable_bucket": datasets[0].config.enable_bucket,
        "ss_batch_size_per_device": datasets[0].config.batch_size,
        "ss_bucket_info": json.dumps({"buckets": bucket_info}),
        "ss_dataset_dirs": json.dumps(folders),
        "ss_tag_frequency": json.dumps(tags),
        "ss_datasets": json.dumps([_dataset_description(dataset) for dataset in datasets]),
    }


def _dataset_description(dataset: IndexedDataset) -> Mapping[str, Any]:
    config = dataset.config
    counts = Counter(example.subset for example in dataset.examples)
    return {
        "is_dreambooth": True,
        "batch_size_per_device": config.batch_size,
        "num_train_images": _appearances(dataset.examples, is_reg=False),
        "num_reg_images": _appearances(dataset.examples, is_reg=True),
        "resolution": list(config.resolution),
        "enable_bucket": config.enable_bucket,
        "min_bucket_reso": config.min_bucket_reso,
        "max_bucket_reso": config.max_bucket_reso,
        "subsets": [_subset_description(subset, counts[subset]) for subset in config.subsets],
    }


def _subset_description(subset: SubsetConfig, images: int) -> Mapping[str, Any]:
    settings = {key: getattr(subset, key) for key in _SUBSET_KEYS}
    return {"img_count": images, **settings, "image_dir": subset.image_dir.name}


def _appearances(examples: Sequence[Example], is_reg: bool) -> int:
    """How often the regularisation images, or the others, appear in an epoch."""
    return sum(example.repeats for example in examples if example.subset.is_reg is is_reg)
