"""The hooks of lorakit: all that a plugin can add.

A plugin is a module named in the entry-point group `lorakit`. It implements any of these functions,
each marked with `@lorakit.hookimpl`. The `register_*` hooks return config classes
(`lorakit.api.components`), so that components can be listed, documented and checked before
anything heavy is imported; each class documents what its `build` returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from lorakit.api.captioner import CaptionerConfig
    from lorakit.api.command import CommandConfig
    from lorakit.api.components import (
        AttentionConfig,
        LRSchedulerConfig,
        NetworkConfig,
        ObserverConfig,
        OptimizerConfig,
        SaverConfig,
    )
    from lorakit.api.dataset_source import DatasetSourceConfig
    from lorakit.api.loss import LossConfig
    from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
    from lorakit.api.preset import PresetConfig
    from lorakit.api.sampling import SamplerConfig, TimestepSamplerConfig
    from lorakit.checkpoints import CheckpointSummary

hookspec = pluggy.HookspecMarker("lorakit")

hookimpl = pluggy.HookimplMarker("lorakit")
"""Marks a function of a plugin as the implementation of one of the hooks below."""


@hookspec
def register_model_families() -> list[type[ModelFamilyConfig]]:  # type: ignore[empty-body]
    """Families of base models, such as Stable Diffusion 1.x."""


@hookspec
def register_networks() -> list[type[NetworkConfig]]:  # type: ignore[empty-body]
    """Networks: kinds of adapters, such as LoRA-LierLa."""


@hookspec
def register_optimizers() -> list[type[OptimizerConfig]]:  # type: ignore[empty-body]
    """Optimizers, such as Lion."""


@hookspec
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:  # type: ignore[empty-body]
    """Learning-rate schedules, such as cosine decay."""


@hookspec
def register_attention_backends() -> list[type[AttentionConfig]]:  # type: ignore[empty-body]
    """Implementations of attention in the denoiser."""


@hookspec
def register_savers() -> list[type[SaverConfig]]:  # type: ignore[empty-body]
    """File formats for trained adapters."""


@hookspec
def register_observers() -> list[type[ObserverConfig]]:  # type: ignore[empty-body]
    """Callbacks, such as a log or a progress bar."""


@hookspec
def register_losses() -> list[type[LossConfig]]:  # type: ignore[empty-body]
    """Losses, such as Huber: how predictions are compared with their targets."""


@hookspec
def register_timestep_samplers() -> list[type[TimestepSamplerConfig]]:  # type: ignore[empty-body]
    """Distributions of the timesteps that are trained on, such as logit-normal."""


@hookspec
def register_samplers() -> list[type[SamplerConfig]]:  # type: ignore[empty-body]
    """Samplers of previews, such as DDIM."""


@hookspec(firstresult=True)
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """The family that a checkpoint belongs to, by the names and shapes of its tensors or its configs, or None.

    A `DetectedFamily` without a name gives a model that no family trains a title for messages.
    """


@hookspec
def register_dataset_sources() -> list[type[DatasetSourceConfig]]:  # type: ignore[empty-body]
    """Sources of images and captions, such as a folder; a subset picks one with `source`."""


@hookspec
def register_commands() -> list[type[CommandConfig]]:  # type: ignore[empty-body]
    """Commands, such as `lorakit train`."""


@hookspec
def register_presets() -> list[type[PresetConfig]]:  # type: ignore[empty-body]
    """Presets of `lorakit init --for`, such as those for a person or a style."""


@hookspec
def register_captioners() -> list[type[CaptionerConfig]]:  # type: ignore[empty-body]
    """Captioners, such as a tagger: what `lorakit caption` writes captions with."""
