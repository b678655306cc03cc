"""Warnings that need the data or the output folder: they are part of a prepared run."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lorakit.config.load import config_from_tables
from lorakit.training.prepare import prepare


def warnings_of(tables: dict[str, Any], folder: Path, *, resuming: bool = False) -> dict[str, str]:
    """The warnings of a run, by key."""
    prepared = prepare(config_from_tables(tables, folder), resuming=resuming)
    return {warning.key: str(warning) for warning in prepared.warnings}


def test_a_finished_lora_that_will_be_replaced(
    train_tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is named with its age; saves on the way, other names, and a run that is resumed, are not warned of."""
    train_tables["output"] = {"dir": "out", "name": "mine"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine-000001.safetensors").touch()
    (tmp_path / "out" / "mine.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    assert "output.name" not in warnings_of(train_tables, tmp_path)
    finished = tmp_path / "out" / "mine.safetensors"
    finished.touch()
    then = datetime.now().replace(hour=21, minute=3) - timedelta(days=1)
    os.utime(finished, (then.timestamp(), then.timestamp()))
    warning = warnings_of(train_tables, tmp_path)["output.name"]
    assert f"{Path('out', 'mine.safetensors')} (yesterday 21:03) will be replaced at the end" in warning
    assert "--set output.name=NAME keeps it" in warning
    assert "output.name" not in warnings_of(train_tables, tmp_path, resuming=True)
    train_tables["saver"] = {"name": "ckpt"}
    assert "mine.ckpt (today" in warnings_of(train_tables, tmp_path)["output.name"]


def test_a_warm_up_as_long_as_the_epochs(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """With epochs the steps are known with the data; a warm-up of fewer is not warned of."""
    train_tables["output"] = {"dir": str(tmp_path / "out")}
    train_tables["training"] = {"max_epochs": 2, "device": "cpu"}
    for warmup, expected in ((1, False), (10_000, True)):
        train_tables["lr_scheduler"] = {"name": "linear", "warmup_steps": warmup}
        assert ("lr_scheduler.warmup_steps" in warnings_of(train_tables, tmp_path)) is expected
