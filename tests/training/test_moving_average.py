"""The average of the adapters over the steps: its formula, what holds it, and that it resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

import lorakit
from lorakit.api.components import OptimizerConfig
from lorakit.api.observer import Observer
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError, Interrupted
from lorakit.plugins.catalog import Catalog
from lorakit.training.checkpoint.state import read_state
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run, run_training
from lorakit.training.step.moving_average import MovingAverage

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)

MakeConfig = Callable[..., TrainConfig]


def averaged(weights: Sequence[Tensor], decay: float) -> Tensor:
    """The average in float64 over the steps of weights, the first of which are those at the start."""
    average = weights[0].double()
    for number, own in enumerate(weights[1:], 1):
        share = min(decay, number / (9 + number))
        average = share * average + (1 - share) * own.double()
    return average


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_formula(decay: float) -> None:
    """Over five steps it is what the formula gives; a step that is not finite is no step of it."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(50, generator=generator)
    average = MovingAverage(SGD([nn.Parameter(weights)], lr=1.0), weights, decay)
    seen = [weights.clone()]
    for number in range(1, 6):
        weights.add_(torch.randn(50, generator=generator))
        seen.append(weights.clone())
        average.update(number, ONE)
    assert (average.average.double() - averaged(seen, decay)).abs().max() < 1e-6
    before = average.average.clone()
    for norm in (torch.nan, torch.inf):
        average.update(6, torch.tensor(norm))
    assert torch.equal(average.average, before)


def test_switching() -> None:
    """Inside the block the average is there; outside, and for states, what is trained, bit for bit."""
    weights = torch.ones(4)
    average = MovingAverage(SGD([nn.Parameter(weights)], lr=1.0), weights, 0.5)
    weights.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    before = weights.clone()
    with average.eval_weights():
        assert torch.equal(weights, torch.ones(4))
        with average.train_weights():
            assert torch.equal(weights, before)
        assert torch.equal(weights, torch.ones(4))
    assert torch.equal(weights, before)


class Noting(Observer):
    """Keeps the trained weights after each step, and may ask for a stop."""

    def __init__(self, handle: RunHandle, last: int | None = None) -> None:
        self.handle, self.last = handle, last
        self.seen = [handle.run.network.adapter_state()]

    def step_finished(self, step: int) -> None:
        """Keep them."""
        self.seen.append(self.handle.run.network.adapter_state())
        self.handle.stop.signalled = step == self.last


def sections(**more: Any) -> dict[str, Any]:
    """A short run whose weights move fast."""
    network = {"rank": 2, "scale_weight_norms": 0.5, "ema": 0.6}
    return {"network": network, "optimizer": {"lr": 0.05}, "training": {"max_steps": 4}, **more}


def test_files_and_evaluation_have_the_average(make_config: MakeConfig) -> None:
    """Files, previews and validation get the average over the steps; a state has what is trained, and the average."""
    run = build_run(prepare(make_config(**sections())), Distributed(CPU))
    handle = RunHandle(run)
    noting = Noting(handle)
    handle.observers.add("noting", noting)
    train(handle)
    with run.evaluating():
        evaluated = run.network.adapter_state()
    saved = load_file(handle.save_adapter("average"))
    trained = run.network.adapter_state()
    for key, tensor in saved.items():
        expected = averaged([own[key] for own in noting.seen], 0.6)
        assert (tensor.double() - expected).abs().max() < 1e-5
        assert torch.equal(evaluated[key], tensor)
        assert torch.equal(trained[key], noting.seen[-1][key])
    assert any((trained[key] - saved[key]).abs().max() > 1e-3 for key in saved)
    state = read_state(handle.save_state(), CPU)
    assert all(torch.equal(state.tensors[key], tensor) for key, tensor in trained.items())


def test_resumes_exactly(make_config: MakeConfig, catalog: Catalog) -> None:
    """A run that goes on from its state ends as one without a break; with another average it does not go on."""
    whole = lorakit.train(make_config(**sections(output={"name": "whole"})))
    run = build_run(prepare(make_config(**sections())), Distributed(CPU))
    handle = RunHandle(run)
    handle.observers.add("stop", Noting(handle, 2))
    with pytest.raises(Interrupted, match="step 2 of 4"):
        train(handle)
    for other in (0.7, None):
        changed = evolve(run.config, network=evolve(run.config.network, ema=other))
        with pytest.raises(ConfigError, match=r"network\.ema: 0\.6 in the state"):
            run_training(prepare(changed), catalog, resume="latest")
    resumed, expected = load_file(run_training(prepare(run.config), catalog, resume="latest")), load_file(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in expected.items())


@frozen(kw_only=True)
class AveragingConfig(OptimizerConfig):
    """An optimizer that averages the weights itself."""

    name = "averaging"
    schedule_free = True


def test_optimizers_that_average(make_config: MakeConfig) -> None:
    """It is refused where the optimizer averages the weights itself."""
    config = evolve(make_config(**sections()), optimizer=AveragingConfig())
    told = {problem.key: str(problem) for problem in config.problems()}
    assert "averaging, which averages the weights itself" in told["network.ema"]
