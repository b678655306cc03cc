"""What every timestep sampler must do."""

from __future__ import annotations

import attrs
import numpy as np
import pytest

from lorakit.api.sampling import TimestepSamplerConfig
from lorakit.diffusion.flow import FlowMatching
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.diffusion.process import NoiseProcess
from lorakit.testing.contracts.component import ComponentContract

SHAPE = (4, 64, 64)
PROCESSES: tuple[NoiseProcess, ...] = (DDPMSchedule(), FlowMatching())


class TimestepSamplerContract(ComponentContract):
    """What every timestep sampler must do, for processes that count steps and for those that are continuous.

    class TestBeta(TimestepSamplerContract):
        config = BetaConfig(a=2.0, b=1.0)
    """

    config: TimestepSamplerConfig

    @pytest.fixture(params=PROCESSES, ids=("DDPM", "flow-matching"))
    def process(self, request: pytest.FixtureRequest) -> NoiseProcess:
        """A noise process."""
        process: NoiseProcess = request.param
        return process

    def drawn(self, process: NoiseProcess, config: TimestepSamplerConfig | None = None, seed: int = 0) -> list[float]:
        """Two thousand timesteps."""
        sample, rng = (config or self.config).build(process), np.random.default_rng(seed)
        return [sample(rng, SHAPE) for _ in range(2000)]

    def test_draws_timesteps_of_the_process(self, process: NoiseProcess) -> None:
        """Integers below the number of timesteps where the process counts them, else numbers from 0 to 1; various."""
        found = self.drawn(process)
        assert all(isinstance(timestep, int if process.spec.num_timesteps else float) for timestep in found)
        assert 0 <= min(found) <= max(found) <= process.spec.end
        assert process.spec.num_timesteps is None or max(found) < process.spec.end
        assert len(set(found)) > 100

    def test_depends_on_the_generator_alone(self, process: NoiseProcess) -> None:
        """The same seed gives the same timesteps, and another one others."""
        assert self.drawn(process) == self.drawn(process) != self.drawn(process, seed=1)

    def test_keeps_to_its_bounds(self, process: NoiseProcess) -> None:
        """Timesteps are from `min` up to but not with `max`, and come near to both."""
        low, high = (process.spec.timestep(fraction) for fraction in (0.25, 0.5))
        found = self.drawn(process, attrs.evolve(self.config, min=low, max=high))
        assert low <= min(found) < max(found) <= high
        assert max(found) < high or not process.spec.num_timesteps
        assert max(found) - min(found) > (high - low) / 2

    def test_shifts(self, process: NoiseProcess) -> None:
        """A shift above 1 gives more noise on average, and one below 1 less."""
        less, none, more = (np.mean(self.drawn(process, attrs.evolve(self.config, shift=s))) for s in (0.25, 1.0, 4.0))
        assert less < none < more
