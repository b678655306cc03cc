"""What every LR scheduler must do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lorakit.api.components import LRSchedulerConfig
from lorakit.testing.contracts.component import ComponentContract
from lorakit.testing.contracts.optimizers import _saved_and_read

RATES = (1e-3, 4e-4)
"""Learning rates of two parameter groups."""
STEPS = 100


class LRSchedulerContract(ComponentContract):
    """What every LR scheduler must do.

        class TestStaircase(LRSchedulerContract):
            config = StaircaseConfig(drops=3)

    Where one of the properties below is not meant to hold, the class says so.
    """

    config: LRSchedulerConfig
    highest_factor = 1.0
    """What the learning rate is multiplied by at most."""
    groups_alike = True
    """Whether all groups get the same factor; not so for one with an absolute lowest learning rate."""
    stretches = True
    """Whether a run twice as long goes through the same factors at half the pace; not so with lengths in steps."""

    def test_factors_are_sensible(self) -> None:
        """At every step of the run the factor is at least 0 and at most the highest, and not always 0."""
        factors = self.factors(STEPS)[0]
        assert len(factors) == STEPS
        assert min(factors) >= 0
        assert 0 < max(factors) <= self.highest_factor * (1 + 1e-9)

    def test_total_steps_set_the_pace(self) -> None:
        """Over twice as many steps the factors are the same at the same share of the run."""
        if not self.stretches:
            pytest.skip("this schedule has lengths in steps")
        assert self.factors(2 * STEPS)[0][::2] == pytest.approx(self.factors(STEPS)[0], abs=1e-9)

    def test_ends_where_the_run_ends(self) -> None:
        """One step beyond `total_steps`, where the last step of every run leads, is neither an error nor a jump up."""
        optimizer, schedule = self.built(STEPS)
        rates = _rates(optimizer, schedule, STEPS + 1)
        steps = [abs(after[0] - before[0]) for before, after in pairwise(rates[:-1])]
        assert 0 <= rates[-1][0] <= rates[-2][0] + max(steps) + 1e-12

    def test_groups_scale_alike(self) -> None:
        """Each group's learning rate is multiplied by the same factor."""
        if not self.groups_alike:
            pytest.skip("this schedule treats groups differently")
        first, second = self.factors(STEPS)
        assert first == pytest.approx(second, rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("done", [1, STEPS // 2, STEPS - 1])
    def test_resumes_exactly(self, done: int) -> None:
        """A new schedule with the saved state gives exactly the rates that the old one gives next."""
        optimizer, schedule = self.built(STEPS)
        _rates(optimizer, schedule, done)
        resumed_optimizer, resumed = self.built(STEPS)
        resumed_optimizer.load_state_dict(_saved_and_read(optimizer.state_dict()))
        resumed.load_state_dict(_saved_and_read(schedule.state_dict()))
        remaining = STEPS - done + 1
        assert _rates(resumed_optimizer, resumed, remaining) == _rates(optimizer, schedule, remaining)

    def built(self, total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """An optimizer of two groups, and the schedule for it."""
        groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in RATES]
        optimizer = SGD(groups)
        return optimizer, self.config.build(optimizer, total_steps)

    def factors(self, total_steps: int) -> list[list[float]]:
        """For each group, what its learning rate is multiplied by at each step of a run."""
        rates = _rates(*self.built(total_steps), total_steps)
        return [[step[group] / rate for step in rates] for group, rate in enumerate(RATES)]


def _rates(optimizer: Optimizer, schedule: LRScheduler, steps: int) -> list[list[float]]:
    """The groups' learning rates in each of the next steps."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates
