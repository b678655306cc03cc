"""Optimizers that say so treat each number by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.api.components import OptimizerConfig
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.network import ParameterGroup
from lorakit.plugins.catalog import Catalog

SHAPES = ((64, 100), (128, 64), (3, 5, 7), (90, 90))


def trained(config: OptimizerConfig, *, whole: bool) -> list[torch.Tensor]:
    """Parameters after three steps with gradients that are the same each time."""
    generator = torch.Generator().manual_seed(0)
    parameters = tuple(nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES)
    flat = FlatParameters([ParameterGroup("unet", "unet", parameters, config.lr)])
    optimizer = config.build(flat.groups_for(config) if whole else flat.groups)
    for _ in range(3):
        flat.gradients.copy_(torch.randn(flat.gradients.shape, generator=generator))
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("name", ["adamw", "lion", "sgdnesterov", "pagedadamw", "pagedadamw32bit"])
def test_the_same_whether_parameters_are_apart_or_together(name: str) -> None:
    """All of a group as one parameter are trained as the parameters are."""
    config = Catalog.discover().find(OptimizerConfig, name)()
    assert config.elementwise
    torch.testing.assert_close(trained(config, whole=True), trained(config, whole=False), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit", "pagedadamw8bit", "pagedlion8bit", "sgdnesterov8bit"])
def test_nearly_the_same_with_8_bit_states(name: str) -> None:
    """Blocks of states span parameters, which changes what states are rounded to, by less than a few steps."""
    config = Catalog.discover().find(OptimizerConfig, name)()
    assert config.elementwise
    pairs = zip(trained(config, whole=True), trained(config, whole=False), strict=True)
    off = torch.cat([(together - apart).flatten() for together, apart in pairs])
    moved = torch.cat([(new - old).flatten() for new, old in zip(trained(config, whole=True), start(), strict=True)])
    assert off.norm() < 0.05 * moved.norm()


def start() -> list[torch.Tensor]:
    """The parameters before the first step."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("name", ["adafactor", "dadaptation"])
def test_others_get_each_parameter(name: str) -> None:
    """Those that look at whole parameters."""
    assert not Catalog.discover().find(OptimizerConfig, name).elementwise
