"""Measured steps: in the mode of the config, for each shape of micro-batches."""

from __future__ import annotations

import logging

import pytest

from lorakit.planning.dummy_batches import Texts
from lorakit.planning.estimate import as_cpu_run
from lorakit.planning.plan import measure
from lorakit.training.prepare import prepare


@pytest.mark.usefixtures("lorakit_one_thread")
def test_steps_are_measured_in_the_mode_of_the_config(make_config, caplog: pytest.LogCaptureFixture) -> None:
    """What the config leaves open is decided first, without images; then each shape has a time."""
    caplog.set_level(logging.INFO, "lorakit")
    config = make_config(network={"parts": ["unet"]}, training={"channels_last": "auto", "max_steps": 100_000})
    prepared = prepare(config)
    timing = measure(prepared, Texts.of(as_cpu_run(prepared)))
    assert len(timing.seconds) == 1
    assert timing.run == pytest.approx(100_000 * min(timing.seconds.values()))
    assert "training.channels_last is o" in caplog.text
