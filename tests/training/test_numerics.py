"""Settings of how devices compute hold for as long as a run lasts, and no longer."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

import lorakit
from lorakit.errors import ConfigError
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from lorakit.training.step import numerics
from lorakit.training.step.numerics import cudnn_benchmark, deterministic_mode, numerics_of, tf32_allowed
from tests.training.conftest import MakeConfig
from tests.training.test_runs import same, weights_of


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32(allowed: bool) -> None:
    """TF32 is allowed to all products or to none, for as long as the run lasts and on CUDA only."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn

    def now() -> list[bool]:
        return [setting.allow_tf32 for setting in settings]

    before = now()

    def inside() -> None:
        with tf32_allowed(allowed, torch.device("cuda")):
            assert now() == [allowed, allowed]
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert now() == before
    with tf32_allowed(not before[0], torch.device("cpu")):
        assert now() == before


NEWER = """
import torch
from lorakit.training.step.numerics import tf32_allowed

matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
matmul.fp32_precision = "tf32"
conv.fp32_precision = "ieee"
for allowed in (True, False):
    with tf32_allowed(allowed, torch.device("cuda")):
        print(matmul.fp32_precision, conv.fp32_precision)
print(matmul.fp32_precision, conv.fp32_precision)
"""


def test_tf32_where_the_newer_settings_are_used() -> None:
    """In a program that says it in PyTorch's newer way, a run does too, and leaves what was there."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("needs a PyTorch with the newer settings")
    result = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == ["tf32", "tf32", "ieee", "ieee", "tf32", "ieee"], result.stderr


@pytest.mark.parametrize(
    ("device", "steps", "deterministic", "timed"),
    [("cuda", 250, False, True), ("cuda", 249, False, False), ("cuda", 3000, True, False), ("cpu", 3000, False, False)],
)
def test_convolutions_are_timed(
    make_config: MakeConfig, device: str, steps: int, deterministic: bool, timed: bool
) -> None:
    """On CUDA, cuDNN times its algorithms if the run is long enough for it, and may differ from another run."""
    training = {"max_steps": steps, "gradient_accumulation_steps": 2, "deterministic": deterministic}
    config = make_config(network={"parts": ["unet"]}, training=training)
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    assert run.schedule.micro_batches_per_shape == 2 * steps  # this dataset has one bucket
    run.processes = Distributed(torch.device(device))
    before = torch.backends.cudnn.benchmark
    with numerics_of(run):
        assert torch.backends.cudnn.benchmark == timed
        with run.evaluating():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark == timed
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.parametrize("found", [True, False])
def test_settings_are_those_before(found: bool) -> None:
    """What a program has set for cuDNN is as it was after a run, also one that fails."""
    torch.backends.cudnn.benchmark = found
    try:
        with suppress(KeyError), cudnn_benchmark(not found):
            assert torch.backends.cudnn.benchmark != found
            raise KeyError
        assert torch.backends.cudnn.benchmark == found
    finally:
        torch.backends.cudnn.benchmark = False


def test_steps_are_computed_so(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps see the setting, as on a device with cuDNN, and nothing after the run does."""
    monkeypatch.setattr(numerics, "_has_cudnn", bool)
    monkeypatch.setattr(numerics, "MIN_PER_SHAPE", 1)
    seen: list[bool] = []
    original = Run.forward_backward

    def noting(*arguments: object) -> None:
        seen.append(torch.backends.cudnn.benchmark)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "forward_backward", noting)
    lorakit.train(make_config(network={"parts": ["unet"]}, training={"max_steps": 2}))
    assert seen == [True, True]
    assert not torch.backends.cudnn.benchmark


def one_that_does_not_repeat() -> Tensor:
    """What PyTorch has no repeatable operation for, on CPUs either: of two values for one place, one wins."""
    return torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)


def test_deterministic_runs(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run computes with repeatable operations only, which has no effect on a CPU, and nothing after the run."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    modes: list[bool] = []
    original = Run.forward_backward

    def noting(*arguments: object) -> None:
        modes.append(torch.are_deterministic_algorithms_enabled())
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "forward_backward", noting)

    def trained(name: str, required: bool) -> Path:
        network = {"name": "c3lier", "dropout": 0.1}
        training = {"deterministic": required, "max_steps": 3, "mixed_precision": "bf16"}
        return lorakit.train(make_config(network=network, training=training, output={"name": name}))

    ordinary, exact = trained("ordinary", False), trained("exact", True)
    assert modes == [False] * 3 + [True] * 3
    assert same(weights_of(ordinary), weights_of(exact))
    assert not torch.are_deterministic_algorithms_enabled()
    assert deterministic.fill_uninitialized_memory
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_what_cannot_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that has no repeatable form is told as a problem of the key; other errors are let through."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with pytest.raises(ConfigError, match=r"training\.deterministic: cannot be had.*put_"), deterministic_mode(True):
        one_that_does_not_repeat()
    with pytest.raises(RuntimeError, match="shape"), deterministic_mode(True):
        torch.zeros(2).view(3, 5)
    with deterministic_mode(False):
        one_that_does_not_repeat()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_deterministic_excludes_measuring(make_config: MakeConfig) -> None:
    """Modes that the clock chooses are refused, those that are named are not."""
    with pytest.raises(ConfigError, match=r"training\.compile: depends on timing"):
        make_config(training={"deterministic": True, "compile": "auto"})
    make_config(training={"deterministic": True, "channels_last": True})
