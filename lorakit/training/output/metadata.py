"""What a LoRA file says about its training, in the keys that webuis and sd-scripts read.

All values are text; numbers and truth values as Python prints them, structures as JSON. The keys
that are read, and by whom, are listed in the file format's documentation (`docs/reference/files.md`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from attrs import asdict, fields
from torch.optim import Optimizer

from lorakit._version import __version__
from lorakit.api.components import TEXT_ENCODER_LR, Component
from lorakit.config.train_config import TrainConfig
from lorakit.data.index import has_augmentation
from lorakit.training.output.dataset_metadata import data_metadata
from lorakit.training.prepare import PreparedRun
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.schedule import Schedule

MINIMAL_KEYS = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
)  # fmt: skip
"""What `metadata.minimal` leaves of the keys that say how a file was trained: those that tools need to use it."""


def run_metadata(
    prepared: PreparedRun, schedule: Schedule, processes: Distributed, optimizer: Optimizer, started: float
) -> dict[str, str]:
    """The metadata that stays the same over a run; `started` is in seconds since 1970."""
    config = prepared.config
    images = config.data.datasets[0].batch_size * processes.world_size
    sampler, (first, last) = config.timestep_sampler, config.timestep_sampler.bounds(config.model.noise_process)
    # The class that others know, not a subclass that adapts it to lorakit, as in `torch.optim.adamw.AdamW`.
    cls = next(cls for cls in type(optimizer).__mro__ if not cls.__module__.startswith("lorakit."))
    settings = ",".join(f"{name}={value}" for name, value in config.optimizer.extra_options().items())
    values = {
        **_training_values(config),
        "ss_max_train_steps": schedule.total_steps,
        "ss_num_epochs": schedule.total_epochs,
        "ss_num_batches_per_epoch": schedule.micro_batches_per_epoch,
        "ss_total_batch_size": images * config.training.gradient_accumulation_steps,
        "ss_loss_type": config.loss.name,
        **{f"ss_{name}": value for name, value in asdict(config.loss).items()},
        "ss_timesteps": json.dumps(_without_defaults(sampler), default=str),
        **config.network.metadata(),
        **data_metadata(prepared.datasets),
        "ss_cache_latents": not has_augmentation(prepared.datasets),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.output.name,
        "modelspec.implementation_version": f"lorakit/{__version__}",
        **({} if sampler.min is sampler.max is None else {"modelspec.timestep_range": f"{first},{last}"}),
        **config.metadata.entries(),
        "ss_optimizer": f"{cls.__module__}.{cls.__qualname__}" + (f"({settings})" if settings else ""),
        "ss_session_id": secrets.randbits(32),
        "ss_training_started_at": started,
        "ss_output_name": config.output.name,
        "ss_num_validation_images": sum(len(dataset.held_out) for dataset in prepared.datasets),
        "ss_training_comment": config.output.training_comment,
        "ss_prior_loss_weight": config.data.prior_loss_weight,
        "ss_weighted_captions": config.data.weighted_captions,
    }
    return {key: str(value) for key, value in values.items()}


def _without_defaults(component: Component) -> dict[str, Any]:
    """The name of a component, and the keys that are not at their defaults."""
    options = {option.name: (getattr(component, option.name), option.default) for option in fields(type(component))}
    return {"name": component.name, **{key: value for key, (value, default) in options.items() if value != default}}


def save_metadata(step: int, epoch: int) -> dict[str, str]:
    """The metadata of one save."""
    now = time.time()
    return {
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_training_finished_at": str(now),
        "modelspec.date": datetime.fromtimestamp(now).isoformat(timespec="seconds"),
    }


def without_training(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without how the file was trained."""
    return {key: text for key, text in metadata.items() if not key.startswith("ss_") or key in MINIMAL_KEYS}


def _training_values(config: TrainConfig) -> dict[str, Any]:
    training, optimizer = config.training, config.optimizer
    encoders = optimizer.lrs_from(TEXT_ENCODER_LR)
    parts, in_fp8 = config.model.parts, set(training.fp8_base)
    return {
        "ss_seed": training.seed,
        "ss_learning_rate": optimizer.lr,
        "ss_unet_lr": optimizer.lr_for(),
        "ss_text_encoder_lr": list(encoders) if len(encoders) > 1 else encoders[0],
        "ss_lr_scheduler": config.lr_scheduler.name,
        "ss_lr_warmup_steps": getattr(config.lr_scheduler, "warmup_steps", 0),
        "ss_max_grad_norm": training.max_grad_norm,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": bool(training.gradient_checkpointing),
        "ss_mixed_precision": training.mixed_precision,
        "ss_full_fp16": False,
        "ss_fp8_base": {part.name for part in parts} <= in_fp8,
        "ss_fp8_base_unet": in_fp8 == {part.name for part in parts if not part.encoders},
    }
