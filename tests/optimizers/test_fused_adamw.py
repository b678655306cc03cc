"""The fused AdamW is PyTorch's, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from lorakit.builtin.optimizers._fused_adamw import FusedAdamW

SETTINGS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = ((3, 5), (7,), (2, 3, 1, 1), (4,))


def parameters() -> list[Tensor]:
    """The same parameters each time; the last of them never has a gradient."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def groups(tensors: list[Tensor]) -> list[dict[str, Any]]:
    """Two groups with learning rates of their own."""
    return [{"params": tensors[:2], "lr": 0.1, "name": "first"}, {"params": tensors[2:], "lr": 0.01, "name": "second"}]


def gradients(step: int) -> Iterator[Tensor]:
    """A gradient for each parameter but the last."""
    generator = torch.Generator().manual_seed(100 + step)
    return (torch.randn(shape, generator=generator) for shape in SHAPES[:-1])


def take_steps(optimizer: torch.optim.Optimizer, tensors: list[Tensor], steps: range) -> None:
    """Take steps with a learning rate that changes."""
    for step in steps:
        for tensor, gradient in zip(tensors, gradients(step), strict=False):
            tensor.grad = gradient
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()


def assert_same(ours: Any, theirs: Any) -> None:
    """Both optimizers hold the same bits."""
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    for one, other in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_steps_are_pytorchs() -> None:
    """Parameters and state equal PyTorch's after several steps, with groups and a parameter without gradient."""
    own, other = parameters(), parameters()
    ours, theirs = FusedAdamW(groups(own), **SETTINGS), AdamW(groups(other), fused=True, **SETTINGS)
    for optimizer, tensors in ((ours, own), (theirs, other)):
        take_steps(optimizer, tensors, range(5))
    assert not torch.equal(own[0], parameters()[0])
    assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))
    assert_same(ours, theirs)


def test_states_are_exchanged() -> None:
    """A state of PyTorch's continues here as it does there."""
    own, other = parameters(), parameters()
    theirs = AdamW(groups(other), fused=True, **SETTINGS)
    take_steps(theirs, other, range(3))
    ours = FusedAdamW(groups(own), **SETTINGS)
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    for tensor, value in zip(own, other, strict=True):
        tensor.data.copy_(value)
    for optimizer, tensors in ((ours, own), (theirs, other)):
        take_steps(optimizer, tensors, range(3, 6))
    assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))
    assert_same(ours, theirs)


@pytest.mark.parametrize("has_overflowed", [False, True])
@pytest.mark.parametrize("is_unscaled", [False, True])
def test_a_loss_scaler_is_heeded(has_overflowed: bool, is_unscaled: bool) -> None:
    """With a scaler's factor and its sign of overflow, steps are PyTorch's: none at all after an overflow."""
    own, other = parameters(), parameters()
    before = [tensor.detach().clone() for tensor in own]
    ours, theirs = FusedAdamW(groups(own), **SETTINGS), AdamW(groups(other), fused=True, **SETTINGS)
    for optimizer, tensors in ((ours, own), (theirs, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.zeros(()))
        for tensor, gradient in zip(tensors, gradients(0), strict=False):
            tensor.grad = gradient * (torch.inf if has_overflowed else 8.0)
        if is_unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))
    assert torch.equal(own[0], before[0]) == has_overflowed
    assert_same(ours, theirs)


def test_a_closure_is_called_with_gradients() -> None:
    """What a closure gives is given, and gradients are on in it."""
    (tensor, *_) = own = parameters()
    optimizer = FusedAdamW(groups(own), **SETTINGS)

    def closure() -> Tensor:
        loss = tensor.square().sum()
        loss.backward()
        return loss.detach()

    before = tensor.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(tensor, before)
