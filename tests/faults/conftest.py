"""The small run that the tests of faults kill."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Reference, SmallRun

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
"""Other systems have no `/proc`, nor limits and disks as these tests need them."""

KILLS = int(os.environ.get("LORAKIT_KILLS", "10"))
"""How many kills there are to be at random moments, shared among the tests that make them.

With 100 or more, everything else that goes wrong is tried at each place, not at some."""


def some(values: Sequence[Any], count: int) -> list[Any]:
    """Evenly spread ones of some values; all of them in a long session."""
    return list(values if KILLS >= 100 else values[:: max(1, len(values) // count)][:count])


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Lets each run compute on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def base_tables(tiny_sd1: Path, photographs: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tables of a run of some seconds on the U-Net alone; all runs share one cache."""
    return {
        "model": {"path": str(tiny_sd1)},
        "data": {
            "image_dir": str(photographs),
            "resolution": 64,
            "cache_dir": str(tmp_path_factory.mktemp("faults") / "cache"),
        },
        "network": {"name": "lierla", "rank": 2, "parts": ["unet"]},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "training": {"max_steps": 8, "device": "cpu"},
        "output": {"name": "test", "save_every_n_steps": 2, "save_state": True},
    }


@pytest.fixture(scope="session")
def reference_run(base_tables: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """The run that the other tests' runs are copies of."""
    return SmallRun(tmp_path_factory.mktemp("reference") / "run", base_tables)


@pytest.fixture(scope="session")
def reference(reference_run: SmallRun) -> Reference:
    """What that run gives when nothing disturbs it, on a cache that another one has filled."""
    reference_run.beside("first").finish()
    return Reference.of(reference_run)


@pytest.fixture
def run(reference_run: SmallRun, reference: Reference, tmp_path: Path) -> SmallRun:
    """The same run, not started yet, in a folder of the test's own."""
    return SmallRun(tmp_path / "run", reference_run.tables)
