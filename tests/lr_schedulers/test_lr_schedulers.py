from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import optimization as hf

from lorakit.api.components import LRSchedulerConfig
from lorakit.builtin.lr_schedulers import (
    ConstantConfig,
    ConstantWithWarmupConfig,
    CosineConfig,
    CosineWithMinLRConfig,
    CosineWithRestartsConfig,
    InverseSqrtConfig,
    LinearConfig,
    PiecewiseConstantConfig,
    PolynomialConfig,
    WarmupStableDecayConfig,
)

STEPS, LR = 40, 2e-4

SCHEDULES: list[tuple[LRSchedulerConfig, Callable[[Optimizer], LRScheduler]]] = [
    (ConstantConfig(), hf.get_constant_schedule),
    (ConstantWithWarmupConfig(warmup_steps=10), lambda o: hf.get_constant_schedule_with_warmup(o, 10)),
    (LinearConfig(), lambda o: hf.get_linear_schedule_with_warmup(o, 0, STEPS)),
    (LinearConfig(warmup_steps=7), lambda o: hf.get_linear_schedule_with_warmup(o, 7, STEPS)),
    (LinearConfig(warmup_steps=0.26), lambda o: hf.get_linear_schedule_with_warmup(o, 10, STEPS)),
    (LinearConfig(warmup_steps=60), lambda o: hf.get_linear_schedule_with_warmup(o, 60, STEPS)),
    (CosineConfig(warmup_steps=7), lambda o: hf.get_cosine_schedule_with_warmup(o, 7, STEPS)),
    (
        CosineWithRestartsConfig(warmup_steps=4, num_cycles=3),
        lambda o: hf.get_cosine_with_hard_restarts_schedule_with_warmup(o, 4, STEPS, num_cycles=3),
    ),
    (
        PolynomialConfig(warmup_steps=4, power=2.0),
        lambda o: hf.get_polynomial_decay_schedule_with_warmup(o, 4, STEPS, lr_end=1e-7, power=2.0),
    ),
    (
        PolynomialConfig(lr_end=5e-5),
        lambda o: hf.get_polynomial_decay_schedule_with_warmup(o, 0, STEPS, lr_end=5e-5),
    ),
    (InverseSqrtConfig(), lambda o: hf.get_inverse_sqrt_schedule(o, 0)),
    (InverseSqrtConfig(warmup_steps=0.2), lambda o: hf.get_inverse_sqrt_schedule(o, 8)),
    (InverseSqrtConfig(warmup_steps=8, timescale=5), lambda o: hf.get_inverse_sqrt_schedule(o, 8, timescale=5)),
    (
        CosineWithMinLRConfig(warmup_steps=4, min_lr_ratio=0.25),
        lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, 4, STEPS, min_lr_rate=0.25),
    ),
    (
        CosineWithMinLRConfig(num_cycles=3, min_lr_ratio=0.1),
        lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, 0, STEPS, num_cycles=1.5, min_lr_rate=0.1),
    ),
    (
        WarmupStableDecayConfig(warmup_steps=4, decay_steps=10),
        lambda o: hf.get_wsd_schedule(o, 4, 10, STEPS),
    ),
    (
        WarmupStableDecayConfig(decay_steps=0.3, min_lr_ratio=0.2, num_cycles=3),
        lambda o: hf.get_wsd_schedule(o, 0, 12, STEPS, min_lr_ratio=0.2, num_cycles=1.5),
    ),
    (
        PiecewiseConstantConfig(step_rules="1:10,0.1:20,0.01:30,0.005"),
        lambda o: get_piecewise_constant_schedule(o, "1:10,0.1:20,0.01:30,0.005"),
    ),
    (
        PiecewiseConstantConfig(step_rules=".5:0.25, 0.1:0.5, 1e-3"),
        lambda o: get_piecewise_constant_schedule(o, "0.5:10,0.1:20,0.001"),
    ),
]


def optimizer(*rates: float) -> Optimizer:
    """A real optimizer with one parameter group for each learning rate."""
    return SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=LR)


def rates_over(scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """The learning rates of each step, by group."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("config", "theirs"), SCHEDULES, ids=lambda value: getattr(value, "name", ""))
def test_equals_libraries(config: LRSchedulerConfig, theirs: Callable[[Optimizer], LRScheduler]) -> None:
    """Every step's learning rate, and the one after the last step, is that of transformers or diffusers."""
    ours = [rate for (rate,) in rates_over(config.build(optimizer(LR), STEPS), STEPS + 1)]
    expected = [rate for (rate,) in rates_over(theirs(optimizer(LR)), STEPS + 1)]
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_each_group_keeps_its_proportion() -> None:
    """Two groups with different learning rates follow the same curve, each from its own."""
    for unet, text_encoder in rates_over(CosineConfig(warmup_steps=5).build(optimizer(1e-4, 1e-5), STEPS), STEPS):
        assert unet == pytest.approx(10 * text_encoder)


def test_polynomial_ends_at_lr_end_for_each_group() -> None:
    """Each group falls to lr_end, also from a learning rate of its own; one that is lower already stays."""
    rates = rates_over(PolynomialConfig(lr_end=1e-5).build(optimizer(1e-4, 1e-3, 1e-6), STEPS), STEPS + 1)
    assert rates[-1] == pytest.approx([1e-5, 1e-5, 1e-6])


def test_resumed_schedule_goes_on() -> None:
    """A schedule restored from its state gives the rates of one that was never interrupted."""
    whole = rates_over(CosineConfig(warmup_steps=5).build(optimizer(LR), STEPS), STEPS)
    first = CosineConfig(warmup_steps=5).build(optimizer(LR), STEPS)
    head = rates_over(first, 17)
    second = CosineConfig(warmup_steps=5).build(optimizer(LR), STEPS)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert head + rates_over(second, STEPS - 17) == whole


def test_warmup_that_makes_no_sense() -> None:
    """A number of steps that is not whole is a problem of `warmup_steps`; whole steps and shares are not."""
    assert [problem.key for problem in LinearConfig(warmup_steps=1.5).problems()] == ["warmup_steps"]
    for good in (0, 0.5, 1, 500):
        assert not list(LinearConfig(warmup_steps=good).problems())
    assert [problem.key for problem in WarmupStableDecayConfig(decay_steps=2.5).problems()] == ["decay_steps"]
    with pytest.raises(ValueError, match="warmup_steps"):
        LinearConfig(warmup_steps=-1)


def test_no_decay_at_the_end() -> None:
    """With a decay of 0 steps the learning rate is the same to the last step."""
    rates = rates_over(WarmupStableDecayConfig(decay_steps=0).build(optimizer(LR), STEPS), STEPS)
    assert rates == [[LR]] * STEPS


@pytest.mark.parametrize("rules", ["", "1:10", "1:10,", "1:0.1:2,3", "a:10,1", "1:-3,1", "1:1.5,1", "-1", "1;2"])
def test_rules_that_cannot_be_read(rules: str) -> None:
    """What is no list of levels is a problem of `step_rules`."""
    assert [problem.key for problem in PiecewiseConstantConfig(step_rules=rules).problems()] == ["step_rules"]


def test_good_rules() -> None:
    """A single factor, blanks, and numbers in any notation are fine."""
    for rules in ("1", "1:10,0.5", "1 : 10, 5e-1", "1.:.5,.1", "1:0.5,0"):
        assert not list(PiecewiseConstantConfig(step_rules=rules).problems())
