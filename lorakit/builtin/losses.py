"""The losses: squared and absolute error, and two in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.hookspecs import hookimpl
from lorakit.api.loss import LossConfig

if TYPE_CHECKING:
    from lorakit.diffusion.process import Loss, NoiseProcess


@frozen(kw_only=True)
class L2Config(LossConfig):
    """Squared error: d²."""

    name = "l2"

    def build(self, noise_process: NoiseProcess) -> Loss:  # noqa: ARG002
        """The squared difference."""
        return lambda prediction, target, timesteps: (prediction - target).square()  # noqa: ARG005


@frozen(kw_only=True)
class L1Config(LossConfig):
    """Absolute error: |d|."""

    name = "l1"

    def build(self, noise_process: NoiseProcess) -> Loss:  # noqa: ARG002
        """The absolute difference."""
        return lambda prediction, target, timesteps: (prediction - target).abs()  # noqa: ARG005


@frozen(kw_only=True)
class HuberConfig(LossConfig):
    """Pseudo-Huber loss: squared near zero, absolute beyond the threshold c: 2c·(√(d²+c²) - c)."""

    name = "huber"
    uses_threshold = True

    def build(self, noise_process: NoiseProcess) -> Loss:
        """The loss, with the threshold of each timestep."""
        from lorakit.diffusion.loss import huber, huber_threshold

        return lambda prediction, target, timesteps: huber(
            prediction - target, huber_threshold(self, noise_process, timesteps)
        )


@frozen(kw_only=True)
class SmoothL1Config(LossConfig):
    """Pseudo-Huber loss divided by its threshold c: 2·(√(d²+c²) - c)."""

    name = "smooth_l1"
    uses_threshold = True

    def build(self, noise_process: NoiseProcess) -> Loss:
        """The loss, with the threshold of each timestep."""
        from lorakit.diffusion.loss import huber_threshold, smooth_l1

        return lambda prediction, target, timesteps: smooth_l1(
            prediction - target, huber_threshold(self, noise_process, timesteps)
        )


@hookimpl
def register_losses() -> list[type[LossConfig]]:
    """All of them."""
    return [L2Config, L1Config, HuberConfig, SmoothL1Config]
