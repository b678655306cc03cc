"""A training step is as few operations as `docs/benchmarks.md` says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.benchmarks.scripts import load


@pytest.fixture(scope="module")
def launches() -> ModuleType:
    """The script that counts them."""
    return load("launches")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models and images are."""
    return tmp_path_factory.mktemp("launches")


def test_views_and_allocations_do_not_count(launches: ModuleType) -> None:
    """Two products, a sum and a copy are four operations, whatever is reshaped and allocated between them."""
    x = torch.ones(4, 4)
    with launches.Counting() as counting:
        y = (x @ x).view(2, 8).t()
        torch.empty(3)
        _ = (y + y).reshape(4, 4)[:2] @ x
    assert dict(counting.count.operations) == {"mm": 2, "add": 1, "clone": 1}
    assert counting.count.bytes == 4 * (3 * 16 + 3 * 16 + 2 * 16 + (8 + 16 + 8))


@pytest.mark.parametrize(("model", "bar"), [("sd15", 2000), ("sdxl", 7000)])
def test_operations_of_a_step(launches: ModuleType, work: Path, model: str, bar: int) -> None:
    """A whole step with LoRA-LierLa on the U-Net stays below the bar, in float32 not above bfloat16."""
    folder = launches.prepare(work, model)
    half, single = (launches.lorakit_step(folder, "lierla", precision).total for precision in ("bf16", "no"))
    assert single <= half <= bar
    assert half > launches.frozen_step(folder, "bf16").total


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion", "lion8bit", "sgdnesterov", "pagedadamw"])
def test_element_wise_optimizers_take_one_kernel(launches: ModuleType, work: Path, optimizer: str) -> None:
    """Their step is a few operations, however many adapters there are."""
    folder = launches.prepare(work, "sd15")
    step = launches.lorakit_step(folder, "lierla", "no", optimizer={"name": optimizer})
    plain = launches.lorakit_step(folder, "lierla", "no", optimizer={"name": "adamw"})
    assert step.total <= plain.total + 20
