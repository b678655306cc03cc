"""The judgement of `benchmarks/soak.py`: what creeps is found, what only jitters is not."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from lorakit.training.progress import Position, line_text
from lorakit.utils.rng import keyed_generator
from tests.benchmarks.scripts import load


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    """The benchmark as a module."""
    return load("soak")


@pytest.mark.parametrize(
    ("leak", "flat"),
    [
        ({}, [True, True, True]),
        ({"memory": 0.0015}, [False, True, True]),
        ({"files": 0.0002}, [True, False, True]),
        ({"slowing": 0.00001}, [True, True, False]),
        ({"machine": 0.00001}, [True, True, True]),
    ],
)
def test_what_creeps_is_found(soak: ModuleType, leak: dict[str, float], flat: list[bool]) -> None:
    """30 MiB, four files, or a fifth of the speed over 20 000 steps fail a run that else jitters around 600 MiB.

    A machine that becomes slower does not.
    """
    jitter, computed, samples = keyed_generator("soak"), 0.0, []
    for step in range(100, 20_001, 100):
        reference = 0.02 * (1 + leak.get("machine", 0.0) * step)
        computed += 100 * 2.5 * reference * (1 + leak.get("slowing", 0.0) * step) * jitter.uniform(0.9, 1.1)
        memory = 600 * jitter.uniform(0.995, 1.005) + leak.get("memory", 0.0) * step
        files = 3 + int(jitter.integers(0, 2)) + int(leak.get("files", 0.0) * step)
        samples.append(soak.Sample(step, computed, computed, memory, files, reference))
    assert [curve.is_flat for curve in soak.curves(samples)] == flat


def test_progress_is_read_from_the_log(soak: ModuleType, tmp_path: Path) -> None:
    """The step that counts is the last one of which the run's log tells, while it trains and while it draws."""
    log, now = tmp_path / "log", datetime(2026, 1, 1, 16, 38, 12, tzinfo=UTC)
    log.write_text("lorakit 0.1.0: config.toml -> out/lora.safetensors\n  steps    3334 epochs of 6 steps\n")
    assert soak.progress(log) == 0
    for position in (Position(done=1599, total=3000, rate=1.03), Position(done=1601, total=3000, busy="validating")):
        with log.open("a") as file:
            print(line_text(position, now), "16:38:12 saved out/lora-step00001601.safetensors", sep="\n", file=file)
        assert soak.progress(log) == position.done
