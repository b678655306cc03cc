"""Runs for the tests of plugins, with what `lorakit.train` keeps to itself: the network and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit.api.observer import Observer
from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run


def train_config(tables: Mapping[str, Any], folder: Path) -> TrainConfig:
    """The config in tables, such as the fixture `train_tables`; relative paths are relative to `folder`.

    Raises ConfigError with every problem found.
    """
    return config_from_tables(tables, folder)


def start_run(config: TrainConfig, *observers: Observer) -> Run:
    """A run before its first step, on the CPU, with these observers and no others.

    Its `network`, `optimizer` and `info`, which observers get, are for tests to look at.
    """
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    for observer in observers:
        run.observers.add(type(observer).__name__, observer)
    return run


def finish_run(run: Run) -> None:
    """Train to the last step; no file is written, unless an observer does."""
    train(run)
