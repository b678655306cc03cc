"""The optimizer `prodigy`: its contract, its steps, and a run with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lorakit_prodigy.optimizer import ProdigyConfig
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.optim import Optimizer

from lorakit.api import ConfigError, Observer, ParameterGroup, StepMetrics
from lorakit.testing.contracts import OptimizerContract
from lorakit.testing.runs import start_run, train_config


class TestProdigy(OptimizerContract):
    """Prodigy with the settings that most use."""

    config = ProdigyConfig(d0=1e-4, weight_decay=0.01, use_bias_correction=True, safeguard_warmup=True)


def steps(optimizer: Optimizer, parameter: Tensor, count: int = 15) -> None:
    """Take steps towards a ramp."""
    target = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    for _ in range(count):
        optimizer.zero_grad()
        (parameter - target).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def start() -> nn.Parameter:
    """A parameter, ½ everywhere."""
    return nn.Parameter(torch.full((30, 40), 0.5))


CHANGES: list[dict[str, Any]] = [
    {"betas": (0.5, 0.6)},
    {"beta3": 0.5},
    {"eps": 1e-2},
    {"weight_decay": 0.5},
    {"weight_decay": 0.5, "decouple": False},
    {"use_bias_correction": True},
    {"d0": 1e-3},
    {"d_coef": 2.0},
    {"growth_rate": 1.02},
    {"slice_p": 11},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_equals_prodigyopt(change: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """With each option, steps are those of prodigyopt, which are others than without it; nothing is printed."""
    ours, theirs, usual = start(), start(), start()
    steps(ProdigyConfig(**change).build([ParameterGroup("unet", "unet", (ours,), 1.0)]), ours)
    assert not capsys.readouterr().out
    steps(Prodigy([theirs], **change), theirs)
    steps(Prodigy([usual]), usual)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, usual)


def test_parts_share_the_learning_rate(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """A text encoder with another learning rate is a problem of the config."""
    train_tables["optimizer"] = {"name": "prodigy", "text_encoder_lr": 0.5}
    with pytest.raises(ConfigError, match=r"optimizer\.text_encoder_lr: must be lr, 1, with prodigy, not 0\.5"):
        train_config(train_tables, tmp_path)


class Rates(Observer):
    """Remembers the learning rates of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def metrics_read(self, metrics: StepMetrics) -> None:
        """The U-Net's."""
        self.seen.append(metrics.learning_rates["unet"])


def test_a_run_with_a_warmup(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """The schedule's first step, at rate 0, does no harm; the reported rates are the estimate times the schedule."""
    train_tables["optimizer"] = {"name": "prodigy", "safeguard_warmup": True, "d0": 1e-4}
    train_tables["lr_scheduler"] = {"name": "constant_with_warmup", "warmup_steps": 2}
    rates = Rates()
    run = start_run(train_config(train_tables, tmp_path), rates)
    run.finish()
    estimate = run.optimizer.param_groups[0]["d"]
    assert rates.seen[0] == 0
    assert 0 < rates.seen[1] < rates.seen[3]
    assert rates.seen[3] == pytest.approx(estimate)
