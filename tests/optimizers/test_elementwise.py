"""Optimizers that say so treat each number by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode

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


def elementwise() -> list[type[OptimizerConfig]]:
    """Every optimizer that is registered and treats each number by itself."""
    catalog = Catalog.discover()
    kinds = [catalog.find(OptimizerConfig, name) for name in catalog.of_kind(OptimizerConfig)]
    return [kind for kind in kinds if kind.elementwise]


@pytest.mark.parametrize("kind", elementwise(), ids=lambda kind: kind.name)
def test_steps_do_not_wait_for_a_gpu(kind: type[OptimizerConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second on, steps on a GPU neither synchronize with it nor read a number, unless they page memory."""
    waits: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: waits.append(given))
    # PyTorch does not know what this operation, which only changes its arguments, gives for tensors without values.
    op = torch.ops.aten._fused_sgd_.default
    monkeypatch.setitem(fake_impls.op_implementations_dict, op, lambda *_args, **_kwargs: None)
    config = kind()
    # Tensors without values on a GPU that need not be there; to read one of their numbers is an error.
    with FakeTensorMode() as mode:
        parameter = nn.Parameter(torch.empty(20_000, device="cuda"))
        parameter.grad = torch.empty_like(parameter)
    optimizer = config.build([ParameterGroup("unet", "unet", (parameter,), config.lr)])
    with mode:
        mode.allow_non_fake_inputs = True
        optimizer.step()
        waits.clear()
        optimizer.step()
    assert bool(waits) == kind.name.startswith("paged")
