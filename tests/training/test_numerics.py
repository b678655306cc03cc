"""Settings of how devices compute hold for as long as a run lasts, and no longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

import lorakit
from lorakit.errors import ConfigError
from lorakit.training.run import Run
from lorakit.training.step.numerics import deterministic_mode, tf32_allowed
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
