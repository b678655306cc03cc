"""The judgement of `benchmarks/soak.py`: what creeps is found, what only jitters is not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

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
    ],
)
def test_what_creeps_is_found(soak: ModuleType, leak: dict[str, float], flat: list[bool]) -> None:
    """30 MiB, four files, or a fifth of the speed over 20 000 steps fail a run that else jitters around 600 MiB."""
    jitter, computed, samples = keyed_generator("soak"), 0.0, []
    for step in range(100, 20_001, 100):
        computed += 100 * 0.05 * (1 + leak.get("slowing", 0.0) * step) * jitter.uniform(0.9, 1.1)
        memory = 600 * jitter.uniform(0.995, 1.005) + leak.get("memory", 0.0) * step
        files = 3 + int(jitter.integers(0, 2)) + int(leak.get("files", 0.0) * step)
        samples.append(soak.Sample(step, computed, computed, memory, files))
    assert [curve.is_flat for curve in soak.curves(samples)] == flat


def test_progress_is_read_from_the_log(soak: ModuleType, tmp_path: Path) -> None:
    """The step that counts is the last one that the progress bar shows."""
    log = tmp_path / "log"
    log.write_text("  1%|  | 9/3000 [00:03<1:34]saved 12/x\r 53%|█▎ | 1601/3000 [19:21<22:42,  1.03step/s, epoch 267]")
    assert soak.progress(log) == 1601
