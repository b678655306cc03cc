"""The model as a saved file would make it, in the middle of a run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import lorakit
from lorakit.api.observer import Observer
from lorakit.training.checkpoint.state import read_state
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from lorakit.training.step.eval_weights import EvaluationWeights


class Averaging(SGD):
    """Trains at one place and is read at another, and rounds on the way, as schedule-free optimizers do."""

    def eval(self) -> None:
        """Go where it is read."""
        self._move(1 / 3)

    def train(self) -> None:
        """Go where it trains, up to rounding."""
        self._move(-1 / 3)

    @torch.no_grad()
    def _move(self, distance: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.sin(parameter), alpha=distance)


def test_evaluation_weights_are_taken_back_exactly() -> None:
    """Inside the block the optimizer's evaluation weights are there; outside, the old ones, bit for bit."""
    parameter = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(1)))
    before = parameter.detach().clone()
    optimizer = Averaging([parameter], lr=0.1)
    weights = EvaluationWeights(optimizer)
    with weights.eval_weights():
        read = parameter.detach().clone()
        assert torch.allclose(read, before + torch.sin(before) / 3)
        with weights.train_weights():
            assert torch.equal(parameter, before)
        assert torch.equal(parameter, read)
    assert torch.equal(parameter, before)
    with weights.train_weights():
        assert torch.equal(parameter, before)


class Strict(SGD):
    """Takes steps only once it was told that training begins, and after each evaluation again."""

    is_training = False

    def eval(self) -> None:
        """No steps from now on."""
        self.is_training = False

    def train(self) -> None:
        """Steps from now on."""
        self.is_training = True

    def step(self, closure=None):
        """One step, or an error."""
        assert self.is_training
        return super().step(closure)


def test_optimizers_are_told_when_training_begins(make_config) -> None:
    """Such an optimizer is told before the first step, and after each save."""
    config = make_config(
        optimizer={"name": f"{__name__}.Strict"}, training={"max_steps": 3}, output={"save_every_n_steps": 1}
    )
    assert lorakit.train(config).is_file()


@pytest.fixture
def run(make_config) -> Run:
    """A run with such an optimizer, its weights where evaluation moves them."""
    config = make_config(optimizer={"name": f"{__name__}.Averaging"}, network={"dropout": 0.5})
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    for parameter in run.network.parameters_of("unet"):
        nn.init.ones_(parameter)
    return run


def test_a_save_while_the_model_is_read(run: Run) -> None:
    """What is saved or measured inside the block leaves the model in it as it is to be read."""
    before = run.network.adapter_state()
    with run.evaluating():
        read = run.network.adapter_state()
        RunHandle(run).save_adapter("within")
        assert all(torch.equal(read[key], tensor) for key, tensor in run.network.adapter_state().items())
        assert not any(adapter.training for adapter in run.network.adapters)
    assert any(not torch.equal(before[key], tensor) for key, tensor in read.items())
    assert all(torch.equal(before[key], tensor) for key, tensor in run.network.adapter_state().items())


def test_a_state_saved_while_the_model_is_read(run: Run) -> None:
    """A state has the weights as they are trained, and an optimizer that takes steps, wherever it is saved."""
    before = run.network.adapter_state()
    with run.evaluating():
        read = run.network.adapter_state()
        folder = RunHandle(run).save_state()
        assert all(torch.equal(read[key], tensor) for key, tensor in run.network.adapter_state().items())
    saved = read_state(folder, torch.device("cpu"))
    assert all(torch.equal(before[key], tensor) for key, tensor in saved.tensors.items())
    handle = RunHandle(run)
    handle.load_state(folder)
    train(handle)


class Looker(Observer):
    """Reads the model in the middle of the run, and tells the others of it."""

    def __init__(self, handle: RunHandle) -> None:
        self.handle, self.run = handle, handle.run
        self.told: list[tuple[int, dict[str, float]]] = []

    def step_finished(self, step: int) -> None:
        """Look, and tell."""
        with self.handle.evaluating() as model:
            assert model is self.run.model
            assert not any(adapter.training for adapter in self.run.network.adapters)
            assert not torch.is_grad_enabled()
        self.handle.tell("validated", step, {"loss": 0.5})

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Remember."""
        self.told.append((step, losses))


def test_observers_are_told_of_events_of_others(make_config) -> None:
    """What one observer tells reaches all; in its block, adapters are in evaluation mode, and then no more."""
    run = build_run(prepare(make_config(training={"max_steps": 2})), Distributed(torch.device("cpu")))
    handle = RunHandle(run)
    looker = Looker(handle)
    handle.observers.add("looker", looker, essential=True)
    train(handle)
    assert looker.told == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert all(adapter.training for adapter in run.network.adapters)
