"""What every component of a kind must do, as suites of tests for plugin authors.

A suite is a class to derive from; the config of the component to test is all it needs:

    from lorakit.testing.contracts import OptimizerContract
    from my_plugin import MyOptimizerConfig

    class TestMyOptimizer(OptimizerContract):
        config = MyOptimizerConfig(lr=1e-2)

pytest then runs the suite's tests on it, with real tiny models and files. The plugin must be installed
(`pip install -e .`), because a suite also checks that lorakit finds the component.
"""

from __future__ import annotations

from lorakit.testing.contracts.attention import AttentionContract
from lorakit.testing.contracts.captioners import CaptionerContract
from lorakit.testing.contracts.commands import CommandContract
from lorakit.testing.contracts.component import ComponentContract
from lorakit.testing.contracts.dataset_sources import DatasetSourceContract
from lorakit.testing.contracts.losses import LossContract
from lorakit.testing.contracts.lr_schedulers import LRSchedulerContract
from lorakit.testing.contracts.model_families import ModelFamilyContract
from lorakit.testing.contracts.networks import NetworkContract
from lorakit.testing.contracts.observers import ObserverContract
from lorakit.testing.contracts.optimizers import OptimizerContract
from lorakit.testing.contracts.presets import PresetContract
from lorakit.testing.contracts.samplers import SamplerContract
from lorakit.testing.contracts.savers import SaverContract
from lorakit.testing.contracts.timestep_samplers import TimestepSamplerContract

__all__ = [
    "AttentionContract",
    "CaptionerContract",
    "CommandContract",
    "ComponentContract",
    "DatasetSourceContract",
    "LRSchedulerContract",
    "LossContract",
    "ModelFamilyContract",
    "NetworkContract",
    "ObserverContract",
    "OptimizerContract",
    "PresetContract",
    "SamplerContract",
    "SaverContract",
    "TimestepSamplerContract",
]
