"""Runs for the tests of plugins, with what `lorakit.train` does not return: the network and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch.optim import Optimizer

from lorakit.api.observer import Observer, RunInfo
from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.networks.network import Network
from lorakit.training.loop import train
from lorakit.training.observers import Observers
from lorakit.training.prepare import prepare
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run


@frozen
class StartedRun:
    """A run before its first step."""

    network: Network
    """The adapters, attached."""
    optimizer: Optimizer
    """The optimizer of their parameters."""
    info: RunInfo
    """What observers get, which saves adapters and states."""
    finish: Callable[[], None]
    """Trains to the last step. No file is written, unless an observer does."""


def train_config(tables: Mapping[str, Any], folder: Path) -> TrainConfig:
    """The config in tables, such as the fixture `train_tables`; relative paths are relative to `folder`.

    Raises ConfigError with every problem found.
    """
    return config_from_tables(tables, folder)


def start_run(config: TrainConfig, *observers: Observer) -> StartedRun:
    """A run on the CPU with these observers and no others; all images are encoded."""
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    handle = RunHandle(run, Observers([(type(observer).__name__, True, observer) for observer in observers]))
    return StartedRun(run.network, run.optimizer, handle, partial(train, handle))
