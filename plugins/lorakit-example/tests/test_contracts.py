"""Each component keeps the contract of its kind."""

from __future__ import annotations

from lorakit_example.network import AttentionOnlyConfig
from lorakit_example.observer import LossCurveConfig
from lorakit_example.optimizer import RAdamConfig

from lorakit.testing.contracts import NetworkContract, ObserverContract, OptimizerContract


class TestAttentionOnly(NetworkContract):
    """The network `attention_only`."""

    config = AttentionOnlyConfig(rank=4, alpha=2.0)


class TestRAdam(OptimizerContract):
    """The optimizer `radam`."""

    config = RAdamConfig(lr=1e-2)


class TestLossCurve(ObserverContract):
    """The observer `loss_curve`."""

    config = LossCurveConfig(every_n_steps=2)
