"""All that a plugin may import of lorakit; nothing else is promised to stay.

`from lorakit.api import OptimizerConfig, hookimpl`. Importing this package imports no torch: a name is
imported when it is first asked for, and those that need torch belong inside `build`, in modules that
`build` imports, or under `if TYPE_CHECKING`. Tests of plugins may use `lorakit.testing` as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.api.block_layout import BlockLayout as BlockLayout
    from lorakit.api.captioner import Captioner as Captioner
    from lorakit.api.captioner import CaptionerConfig as CaptionerConfig
    from lorakit.api.command import CommandConfig as CommandConfig
    from lorakit.api.components import AttentionConfig as AttentionConfig
    from lorakit.api.components import Component as Component
    from lorakit.api.components import LRSchedulerConfig as LRSchedulerConfig
    from lorakit.api.components import ModelPart as ModelPart
    from lorakit.api.components import NetworkConfig as NetworkConfig
    from lorakit.api.components import ObserverConfig as ObserverConfig
    from lorakit.api.components import OptimizerConfig as OptimizerConfig
    from lorakit.api.components import SaverConfig as SaverConfig
    from lorakit.api.components import with_import_path as with_import_path
    from lorakit.api.dataset_source import DatasetSource as DatasetSource
    from lorakit.api.dataset_source import DatasetSourceConfig as DatasetSourceConfig
    from lorakit.api.dataset_source import SourceImage as SourceImage
    from lorakit.api.hookspecs import hookimpl as hookimpl
    from lorakit.api.learning_rate_free import skip_at_zero_lr as skip_at_zero_lr
    from lorakit.api.lora_layout import LoRALayout as LoRALayout
    from lorakit.api.loss import LossConfig as LossConfig
    from lorakit.api.lr_schedules import WarmupConfig as WarmupConfig
    from lorakit.api.lr_schedules import check_steps as check_steps
    from lorakit.api.lr_schedules import check_warmup as check_warmup
    from lorakit.api.lr_schedules import cosine_factor as cosine_factor
    from lorakit.api.lr_schedules import resolve_steps as resolve_steps
    from lorakit.api.model_family import CaptionLengths as CaptionLengths
    from lorakit.api.model_family import DetectedFamily as DetectedFamily
    from lorakit.api.model_family import ModelFamilyConfig as ModelFamilyConfig
    from lorakit.api.network_metadata import network_args as network_args
    from lorakit.api.noise import DDPMSpec as DDPMSpec
    from lorakit.api.noise import FlowSpec as FlowSpec
    from lorakit.api.noise import NoiseSpec as NoiseSpec
    from lorakit.api.noise import ShiftLine as ShiftLine
    from lorakit.api.observer import Every as Every
    from lorakit.api.observer import Observer as Observer
    from lorakit.api.observer import RunInfo as RunInfo
    from lorakit.api.observer import StepMetrics as StepMetrics
    from lorakit.api.preset import Preset as Preset
    from lorakit.api.preset import PresetConfig as PresetConfig
    from lorakit.api.sampling import SamplerConfig as SamplerConfig
    from lorakit.api.sampling import TimestepSamplerConfig as TimestepSamplerConfig
    from lorakit.checkpoints.location import HubModel as HubModel
    from lorakit.checkpoints.location import locate as locate
    from lorakit.checkpoints.summary import CheckpointSummary as CheckpointSummary
    from lorakit.config.dump import to_tables as to_tables
    from lorakit.config.train_config import TrainConfig as TrainConfig
    from lorakit.diffusion.flow import FlowMatching as FlowMatching
    from lorakit.diffusion.noise_schedule import DDPMSchedule as DDPMSchedule
    from lorakit.diffusion.process import Loss as Loss
    from lorakit.diffusion.process import NoiseProcess as NoiseProcess
    from lorakit.diffusion.process import Predict as Predict
    from lorakit.diffusion.process import Sampler as Sampler
    from lorakit.diffusion.process import TimestepSampler as TimestepSampler
    from lorakit.errors import AdapterError as AdapterError
    from lorakit.errors import ConfigError as ConfigError
    from lorakit.errors import DataError as DataError
    from lorakit.errors import Interrupted as Interrupted
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.errors import ModelError as ModelError
    from lorakit.errors import NotSaved as NotSaved
    from lorakit.errors import OutOfMemory as OutOfMemory
    from lorakit.errors import OutputError as OutputError
    from lorakit.errors import PluginError as PluginError
    from lorakit.errors import Problem as Problem
    from lorakit.errors import TrainingDiverged as TrainingDiverged
    from lorakit.models.base import BaseModel as BaseModel
    from lorakit.models.base import PartModule as PartModule
    from lorakit.models.conditioning import ImageSizes as ImageSizes
    from lorakit.models.interfaces import AdaptationTarget as AdaptationTarget
    from lorakit.models.interfaces import AttentionBackend as AttentionBackend
    from lorakit.models.interfaces import Conditioning as Conditioning
    from lorakit.models.interfaces import DiffusionModel as DiffusionModel
    from lorakit.models.interfaces import Memo as Memo
    from lorakit.models.interfaces import TextEncoder as TextEncoder
    from lorakit.models.interfaces import Tokens as Tokens
    from lorakit.models.vae import VaeDecoder as VaeDecoder
    from lorakit.models.vae import VaeEncoder as VaeEncoder
    from lorakit.models.vae import read_vae_decoder as read_vae_decoder
    from lorakit.models.vae import read_vae_encoder as read_vae_encoder
    from lorakit.models.weights.checkpoint import DIFFUSERS_FILES as DIFFUSERS_FILES
    from lorakit.models.weights.checkpoint import TRANSFORMERS_FILES as TRANSFORMERS_FILES
    from lorakit.models.weights.checkpoint import CheckpointPart as CheckpointPart
    from lorakit.models.weights.checkpoint import ModelCheckpoint as ModelCheckpoint
    from lorakit.models.weights.checkpoint import PartFormat as PartFormat
    from lorakit.models.weights.folders import TensorSlice as TensorSlice
    from lorakit.models.weights.merge_lora import MergedFile as MergedFile
    from lorakit.models.weights.merge_lora import Merging as Merging
    from lorakit.networks.adapter_file import AdapterFile as AdapterFile
    from lorakit.networks.adapter_file import Saver as Saver
    from lorakit.networks.config import LoRAConfig as LoRAConfig
    from lorakit.networks.dropout import DropoutRates as DropoutRates
    from lorakit.networks.flat_parameters import FlatParameters as FlatParameters
    from lorakit.networks.flat_parameters import FlatView as FlatView
    from lorakit.networks.lora import LoRAModule as LoRAModule
    from lorakit.networks.lora import LoRANetwork as LoRANetwork
    from lorakit.networks.network import AdapterModule as AdapterModule
    from lorakit.networks.network import Network as Network
    from lorakit.networks.network import ParameterGroup as ParameterGroup
    from lorakit.networks.network import torch_groups as torch_groups
    from lorakit.networks.ranked import LRFactors as LRFactors
    from lorakit.networks.ranked import RankedModule as RankedModule
    from lorakit.networks.ranked import RankedNetwork as RankedNetwork
    from lorakit.networks.ranked_config import RankedConfig as RankedConfig
    from lorakit.plugins.import_path import check_import_path as check_import_path
    from lorakit.plugins.import_path import import_class as import_class
    from lorakit.plugins.import_path import instantiate as instantiate
    from lorakit.utils.rng import derived_seed as derived_seed
    from lorakit.utils.rng import keyed_generator as keyed_generator

MODULES: Mapping[str, str] = {
    name: module
    for module, name in re.findall(
        r"^    from (\S+) import (\w+) as \w+$", Path(__file__).read_text("utf-8"), re.MULTILINE
    )
}
"""Where each name is defined, read from the imports above, which type checkers see and Python does not run."""

__all__ = sorted(MODULES)  # noqa: PLE0605 - type checkers go by the aliases above


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for (PEP 562)."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
