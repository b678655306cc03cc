"""Networks of LyCORIS keep the contract of networks."""

from __future__ import annotations

from pathlib import Path

from lorakit_network_modules.component import NetworkModuleConfig

from lorakit.api import with_import_path
from lorakit.testing.contracts import NetworkContract

PRESET = Path(__file__).with_name("transformers.toml")
"""A preset for the layers that LoRA-LierLa adapts; LyCORIS' own ones add the time embedding."""


def lycoris(algo: str, dropout: float = 0.0, **args: bool | float | str) -> NetworkModuleConfig:
    """An algorithm of LyCORIS."""
    settings = {"algo": algo, "preset": str(PRESET), **args}
    component = with_import_path(NetworkModuleConfig, "lycoris.kohya")
    return component(rank=4, alpha=2.0, dropout=dropout, args=settings)


class TestLoHa(NetworkContract):
    """LoHa: the Hadamard product of two low-rank updates."""

    config = lycoris("loha")


class TestLoKr(NetworkContract):
    """LoKr: a Kronecker product."""

    config = lycoris("lokr", factor=4)


class TestLoCon(NetworkContract):
    """LoCon with dropouts."""

    config = lycoris("locon", dropout=0.1, rank_dropout=0.1)


class TestWithScalars(NetworkContract):
    """LoHa with a trained scalar, which is part of the other tensors in files."""

    config = lycoris("loha", use_scalar=True)
