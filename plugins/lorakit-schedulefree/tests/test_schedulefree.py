"""The schedule-free optimizers: their contracts, what is saved, and how a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from lorakit_schedulefree.optimizers import AdamWScheduleFreeConfig, RAdamScheduleFreeConfig, SGDScheduleFreeConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit
from lorakit.api import OptimizerConfig, ParameterGroup, TrainConfig
from lorakit.testing.contracts import OptimizerContract
from lorakit.testing.runs import start_run, train_config

NAMES = ["adamw_schedulefree", "radam_schedulefree", "sgd_schedulefree"]
Configure = Callable[..., TrainConfig]


class TestAdamW(OptimizerContract):
    """AdamW."""

    config = AdamWScheduleFreeConfig(lr=3e-2, weight_decay=0.01)


class TestRAdam(OptimizerContract):
    """RAdam, whose first steps are silent unless it is told otherwise."""

    config = RAdamScheduleFreeConfig(lr=3e-2, silent_sgd_phase=False)


class TestSGD(OptimizerContract):
    """Gradient descent."""

    config = SGDScheduleFreeConfig(lr=0.5)


@pytest.fixture
def configure(train_tables: dict[str, Any], tmp_path: Path) -> Configure:
    """A function from the name of an optimizer, the number of steps, and [output], to a config."""

    def make(optimizer: str, steps: int = 8, file: str = "lora", **output: Any) -> TrainConfig:
        settings: dict[str, Any] = {"name": optimizer, "lr": 10.0 if "sgd" in optimizer else 1e-2}
        if optimizer == "adamw_schedulefree":
            settings["warmup_steps"] = 3
        train_tables["optimizer"] = settings
        train_tables["training"] = {"max_steps": steps, "device": "cpu"}
        train_tables["output"] = {"dir": str(tmp_path / "out"), "name": file, **output}
        return train_config(train_tables, tmp_path)

    return make


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_has_the_averaged_weights(name: str, configure: Configure) -> None:
    """What is saved is the average x = y + (1 − 1/β)(z − y), and what goes on to train is y, which differs."""
    run = start_run(configure(name))
    run.finish()
    training = {key: tensor.clone() for key, tensor in run.network.adapter_state().items()}
    saved = load_file(run.info.save_adapter("now"))
    assert same(run.network.adapter_state(), training)
    group = run.optimizer.param_groups[0]
    beta = group["momentum"] if "momentum" in group else group["betas"][0]
    with torch.no_grad():
        for y in [own for one in run.optimizer.param_groups for own in one["params"]]:
            y.add_(run.optimizer.state[y]["z"] - y, alpha=1 - 1 / beta)
    for key, averaged in run.network.adapter_state().items():
        torch.testing.assert_close(saved[key], averaged.contiguous(), rtol=1e-4, atol=1e-6)
    moved = [key for key in saved if not torch.allclose(saved[key], training[key], rtol=1e-4, atol=1e-6)]
    assert len(moved) > len(saved) / 4


@pytest.mark.parametrize("name", NAMES)
def test_saves_and_states_on_the_way_change_nothing(name: str, configure: Configure) -> None:
    """A run that saves at every step, and one that goes on from a state, end as one without, bit for bit."""
    plain = load_file(lorakit.train(configure(name, file="plain")))
    lorakit.train(configure(name, 4, file="busy", save_every_n_steps=1, save_state=True))
    resumed = lorakit.train(configure(name, file="busy", save_every_n_steps=1), resume="latest")
    assert same(plain, load_file(resumed))


def test_schedules_are_warned_of(configure: Configure, train_tables: dict[str, Any]) -> None:
    """Any schedule but the constant one is a warning, which says where a warm-up belongs."""
    assert not list(configure("adamw_schedulefree").warnings())
    train_tables["lr_scheduler"] = {"name": "cosine"}
    (warning,) = configure("adamw_schedulefree").warnings()
    assert warning.key == "lr_scheduler.name"
    assert str(warning).endswith("which needs no schedule (for a warm-up, set optimizer.warmup_steps)")


CHANGES: list[tuple[OptimizerConfig, dict[str, Any]]] = [
    (AdamWScheduleFreeConfig(warmup_steps=2), {"betas": (0.5, 0.6), "eps": 0.1, "warmup_steps": 5}),
    (RAdamScheduleFreeConfig(), {"betas": (0.5, 0.6), "eps": 0.1, "silent_sgd_phase": False}),
    (SGDScheduleFreeConfig(warmup_steps=2), {"momentum": 0.5, "warmup_steps": 5}),
]


@pytest.mark.parametrize(("config", "changes"), CHANGES, ids=NAMES)
def test_every_option_has_an_effect(config: OptimizerConfig, changes: dict[str, Any]) -> None:
    """Each option by itself changes where a few steps lead."""
    usual = trained(config)
    for name, value in {**changes, "weight_decay": 0.5, "r": 2.0}.items():
        assert not torch.equal(trained(evolve(config, **{name: value})), usual), name
    if "warmup_steps" in changes:
        assert not torch.equal(trained(evolve(config, weight_lr_power=0.0)), usual)


def trained(config: OptimizerConfig) -> Tensor:
    """Where a few steps towards a ramp lead, on average."""
    parameter = nn.Parameter(torch.full((20,), 0.5))
    optimizer: Any = config.build([ParameterGroup("unet", "unet", (parameter,), 0.05)])
    optimizer.train()
    for _ in range(12):
        optimizer.zero_grad()
        (parameter - torch.linspace(-1, 1, 20)).square().sum().backward()
        optimizer.step()
    optimizer.eval()
    return parameter.detach()
