"""What every observer must do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit.api.components import ObserverConfig
from lorakit.api.observer import Observer, RunInfo, StepMetrics
from lorakit.config.load import config_from_tables
from lorakit.plugins.catalog import Catalog
from lorakit.testing.contracts.component import ComponentContract
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run


class ObserverContract(ComponentContract):
    """What every observer must do.

        class TestLossCurve(ObserverContract):
            config = LossCurveConfig(every_n_steps=1)

    With settings that make it act in a run of four steps and two epochs.
    """

    config: ObserverConfig
    run_settings: Mapping[str, Mapping[str, Any]] = {}
    """Settings of other sections of the config file that the observer acts by, by section."""

    @pytest.fixture
    def run_info(self, train_tables: dict[str, Any], tmp_path: Path) -> RunHandle:
        """A real run of four steps, before its first one; its output folder is there."""
        config = self.train_config(self.with_settings(train_tables), tmp_path)
        run = build_run(prepare(config), Distributed(torch.device("cpu")))
        run.writer.write_config(Catalog())
        return RunHandle(run)

    @pytest.mark.parametrize("first_step", [0, 3])
    def test_bears_a_whole_run(self, run_info: RunHandle, first_step: int) -> None:
        """All events of a run, from the start or resumed, pass without an error."""
        run = run_info
        run.run.step = run.run.first_step = first_step
        observer = self.config.build(run)
        observer.run_started(run)
        for step in range(first_step + 1, run.total_steps + 1):
            _tell_of_step(observer, step, epoch=(step + 1) // 2)
            if step % 2 == 0:
                observer.epoch_finished(step // 2)
                observer.adapter_saved(run.save_adapter(f"lora-{step // 2:06d}"))
                observer.state_saved(run.save_state())
        observer.run_finished()
        observer.closed()

    def test_bears_a_run_that_stops_early(self, run_info: RunInfo) -> None:
        """A run may end before its first step, or in the middle of an epoch."""
        self.config.build(run_info).closed()
        observer = self.config.build(run_info)
        observer.run_started(run_info)
        _tell_of_step(observer, 1, epoch=1)
        observer.closed()

    def test_does_not_change_the_result(
        self, train_tables: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A run with the observer gives the same weights as one without any, bit for bit, and does not lose it."""
        tables = self.with_settings(train_tables)
        run = build_run(prepare(config_from_tables(tables, tmp_path)), Distributed(torch.device("cpu")))
        train(RunHandle(run))
        without = run.network.adapter_state()
        observed = load_file(lorakit.train(self.train_config(tables, tmp_path)))
        assert observed.keys() == without.keys()
        assert all(torch.equal(observed[key], tensor) for key, tensor in without.items())
        assert not [record for record in caplog.records if record.name == "lorakit.training.observers"]

    def with_settings(self, tables: dict[str, Any]) -> dict[str, Any]:
        """The tables with `run_settings` in them."""
        changed = {section: {**tables.get(section, {}), **values} for section, values in self.run_settings.items()}
        return {**tables, **changed}


def _tell_of_step(observer: Observer, step: int, epoch: int) -> None:
    rates = {"text_encoder": 1e-4, "unet": 1e-3}
    observer.busy("validating")
    observer.step_finished(step)
    observer.metrics_read(StepMetrics(step=step, epoch=epoch, loss=1 / step, gradient_norm=0.5, learning_rates=rates))
    observer.previews_drawn(step, [])
    observer.validated(step, {"average": 2 / step, "divergence": 1 / step})
