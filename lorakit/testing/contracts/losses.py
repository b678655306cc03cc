"""What every loss must do.

B images, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.api.noise import NoiseSpec
from lorakit.diffusion.flow import FlowMatching
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.diffusion.process import NoiseProcess
from lorakit.testing.contracts.component import ComponentContract

PROCESSES: tuple[NoiseProcess, ...] = (DDPMSchedule(), DDPMSchedule("v_prediction"), FlowMatching())
FRACTIONS = (0.0, 0.1, 0.5, 0.999)


def timesteps(spec: NoiseSpec) -> Tensor:
    """Four timesteps from the first to nearly the last, [4]."""
    return torch.tensor([spec.timestep(fraction) for fraction in FRACTIONS])


class LossContract(ComponentContract):
    """What every loss must do, for each noise process that its config accepts.

    class TestCharbonnier(LossContract):
        config = CharbonnierConfig(epsilon=1e-3)
    """

    config: LossConfig

    @pytest.fixture(params=PROCESSES, ids=("DDPM-epsilon", "DDPM-v_prediction", "flow-matching"))
    def process(self, request: pytest.FixtureRequest) -> NoiseProcess:
        """A noise process."""
        process: NoiseProcess = request.param
        if list(process.spec.loss_problems(self.config)):
            pytest.skip("its config refuses this process")
        return process

    def test_compares_number_by_number(self, process: NoiseProcess) -> None:
        """Each number has its own loss, float32, which depends on no other number and no other image."""
        prediction, target = _numbers(1), _numbers(2)
        steps, compare = timesteps(process.spec), self.config.build(process)
        losses = compare(prediction, target, steps)
        assert losses.shape == prediction.shape
        assert losses.dtype == torch.float32
        assert losses.isfinite().all()
        torch.testing.assert_close(compare(prediction[1:2], target[1:2], steps[1:2]), losses[1:2])
        changed = prediction.clone()
        changed[0, 0, 0, 0] += 1
        assert (compare(changed, target, steps) != losses).sum() == 1

    def test_is_least_for_the_target(self, process: NoiseProcess) -> None:
        """The target itself has the least loss, and a gradient that is finite; the further away, the more it costs."""
        target, steps, compare = _numbers(2), timesteps(process.spec), self.config.build(process)
        costs = [compare(target + distance, target, steps) for distance in (0.0, 0.1, 1.0, 10.0)]
        for nearer, further in pairwise(costs):
            assert (nearer < further).all()
        prediction = target.clone().requires_grad_()
        compare(prediction, target, steps).sum().backward()  # type: ignore[no-untyped-call]
        assert prediction.grad is not None
        assert prediction.grad.isfinite().all()

    def test_gradient_points_to_the_target(self, process: NoiseProcess) -> None:
        """Every number that is too large has a positive gradient, and every one that is too small a negative one."""
        target, steps, compare = _numbers(2), timesteps(process.spec), self.config.build(process)
        prediction = _numbers(1).requires_grad_()
        compare(prediction, target, steps).sum().backward()  # type: ignore[no-untyped-call]
        assert prediction.grad is not None
        assert torch.equal(prediction.grad.sign(), (prediction.detach() - target).sign())


def _numbers(seed: int) -> Tensor:
    """Normal numbers, float32 [4, C, h, w]."""
    return torch.randn(4, 4, 3, 5, generator=torch.Generator().manual_seed(seed))
