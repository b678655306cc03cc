"""What every optimizer must do."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import pytest
import torch
from attrs import define, field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lorakit.api.components import OptimizerConfig
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.network import ParameterGroup
from lorakit.testing.contracts.component import ComponentContract
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.step.eval_weights import begin_training
from lorakit.training.step.gradients import FlatGradients
from lorakit.training.step.nan_guard import StepGuard

SHAPES: Mapping[str, list[tuple[int, ...]]] = {
    "text_encoder": [(4, 32), (32, 4)],
    "unet": [(8, 64), (64, 8, 1, 1), (8, 16, 3, 3), (80, 64)],
}
"""Shapes like those of LoRA factors, by part of the model; the last has enough numbers for 8-bit states."""


class OptimizerContract(ComponentContract):
    """What every optimizer must do.

        class TestSignum(OptimizerContract):
            config = SignumConfig(lr=1e-3)

    The learning rate should be one that suits parameters of size 0.1 and about a hundred steps.
    """

    config: OptimizerConfig
    steps = 100
    """Steps in which the optimizer should halve the loss of a simple problem."""

    def test_lowers_the_loss(self) -> None:
        """A convex problem, a weighted distance to a target, is reduced to less than half of its first loss."""
        problem = Problem.fresh(self.config)
        first = problem.loss().item()
        problem.solve(self.steps)
        assert problem.loss().item() < first / 2

    def test_groups_keep_their_names_and_parameters(self) -> None:
        """Logs find each group under its name, and each group updates its own parameters."""
        problem = Problem.fresh(self.config)
        built = {group["name"]: group["params"] for group in problem.optimizer.param_groups}
        assert list(built) == [group.name for group in problem.groups]
        for group in problem.groups:
            numbers = torch.cat([parameter.detach().flatten() for parameter in group.parameters])
            assert torch.equal(torch.cat([own.detach().flatten() for own in built[group.name]]), numbers)

    def test_groups_keep_their_learning_rates(self) -> None:
        """Each group begins with the learning rate that the config gives its part of the model."""
        share = 0.5 if self.config.supports_group_lrs else 1.0
        problem = Problem.fresh(self.config, text_encoder_lr=self.config.lr * share)
        assert [group["lr"] for group in problem.optimizer.param_groups] == [self.config.lr * share, self.config.lr]

    def test_learning_rate_zero_changes_nothing(self) -> None:
        """A group with the learning rate 0 stays as it is, bit for bit, while the other moves."""
        problem = Problem.fresh(self.config, text_encoder_lr=0.0)
        before = problem.copies()
        problem.solve(3)
        frozen, trained = problem.groups
        assert all(torch.equal(now, old) for now, old in zip(frozen.parameters, before["text_encoder"], strict=True))
        assert not any(torch.equal(now, old) for now, old in zip(trained.parameters, before["unet"], strict=True))

    def test_follows_the_lr_scheduler(self) -> None:
        """While the LR schedule's factor is 0, as at the start of a warm-up, nothing moves; then all does."""
        problem = Problem.fresh(self.config)
        schedule = LambdaLR(problem.optimizer, lambda step: float(step >= 2))
        before = problem.copies()
        for moves in (False, False, True):
            problem.solve(1)
            schedule.step()
            assert problem.differs_from(before) == moves

    def test_resumes_exactly(self) -> None:
        """A new optimizer with the saved state continues bit for bit as the old one does."""
        original = Problem.fresh(self.config)
        original.solve(3)
        resumed = Problem.fresh(self.config)
        resumed.take_over(original.copies())
        resumed.optimizer.load_state_dict(_saved_and_read(original.optimizer.state_dict()))
        for problem in (original, resumed):
            problem.solve(3)
        assert not original.differs_from(resumed.copies())

    def test_bears_gradients_of_zero(self) -> None:
        """Gradients that are all zero, as when the model is right already, break nothing then or later."""
        problem = Problem.fresh(self.config)
        for _ in range(3):
            problem.optimizer.step()
        problem.solve(3)
        assert all(parameter.isfinite().all() for parameter in problem.parameters)

    @pytest.mark.parametrize("scaled", [False, True])
    def test_a_step_that_is_skipped_changes_nothing(self, scaled: bool) -> None:
        """Steps whose gradients are NaN, the very first among them, leave parameters and state as they were."""
        problem, hit = (Problem.fresh(self.config) for _ in range(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=scaled)
        guard = StepGuard(hit.optimizer, scaler, Distributed(torch.device("cpu")), skips=True)
        for step in range(5):
            loss = hit.loss() * (torch.nan if step in {0, 3} else 1.0)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            guard.mark(hit.gradients, loss)
            scaler.unscale_(hit.optimizer)
            guard.step(hit.gradients.clip(0.0))
            hit.gradients.zero()
        problem.solve(3)
        assert not hit.differs_from(problem.copies())
        for one in (problem, hit):
            one.solve(3)
        assert not hit.differs_from(problem.copies())

    def test_leaves_the_gradient_buffer_in_place(self) -> None:
        """Gradients stay views of the engine's one buffer, which is zeroed and reduced as a whole."""
        problem = Problem.fresh(self.config)
        addresses = [parameter.grad.data_ptr() for parameter in problem.parameters if parameter.grad is not None]
        problem.solve(2)
        after = [parameter.grad.data_ptr() for parameter in problem.parameters if parameter.grad is not None]
        assert after == addresses
        assert len(after) == len(problem.parameters)


@define
class Problem:
    """Parameters that should come close to a target, ½·Σ w·(p − target)², and the optimizer that moves them."""

    groups: list[ParameterGroup]
    optimizer: Optimizer
    targets: list[Tensor] = field(init=False)
    weights: list[Tensor] = field(init=False)
    flat: FlatParameters
    gradients: FlatGradients = field(init=False)

    @classmethod
    def fresh(cls, config: OptimizerConfig, text_encoder_lr: float | None = None) -> Problem:
        """The problem at its start, the same each time; `text_encoder_lr` is that of the first group."""
        generator = torch.Generator().manual_seed(0)
        rates = {"unet": config.lr, "text_encoder": config.lr if text_encoder_lr is None else text_encoder_lr}
        groups = [
            ParameterGroup(part, part, tuple(_parameter(shape, generator) for shape in shapes), rates[part])
            for part, shapes in SHAPES.items()
        ]
        flat = FlatParameters(groups)
        problem = cls(groups, config.build(flat.groups_for(config)), flat)
        begin_training(problem.optimizer)
        return problem

    def __attrs_post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.targets = [0.1 * torch.randn(own.shape, generator=generator) for own in self.parameters]
        self.weights = [0.1 + torch.rand(own.shape, generator=generator) for own in self.parameters]
        self.gradients = FlatGradients(self.flat)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of all groups."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def loss(self) -> Tensor:
        """A scalar."""
        terms = zip(self.weights, self.parameters, self.targets, strict=True)
        return torch.stack([(weight * (own - target).square()).sum() / 2 for weight, own, target in terms]).sum()

    def solve(self, steps: int) -> None:
        """Take this number of steps."""
        for _ in range(steps):
            self.loss().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.gradients.zero()

    def copies(self) -> dict[str, list[Tensor]]:
        """The parameters as they are now, by group."""
        return {group.name: [own.detach().clone() for own in group.parameters] for group in self.groups}

    def take_over(self, copies: Mapping[str, list[Tensor]]) -> None:
        """Set the parameters."""
        for group in self.groups:
            for own, copy in zip(group.parameters, copies[group.name], strict=True):
                own.data.copy_(copy)

    def differs_from(self, copies: Mapping[str, list[Tensor]]) -> bool:
        """Whether any parameter differs by a bit."""
        pairs = [(own, copy) for g in self.groups for own, copy in zip(g.parameters, copies[g.name], strict=True)]
        return not all(torch.equal(own, copy) for own, copy in pairs)


def _parameter(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(0.1 * torch.randn(shape, generator=generator))


def _saved_and_read(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a file of `--resume`, of which no code is run."""
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    read: dict[str, Any] = torch.load(buffer, weights_only=True)
    return read
