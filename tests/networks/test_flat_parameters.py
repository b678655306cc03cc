from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorakit.api import OptimizerConfig
from lorakit.networks.flat_parameters import FlatParameters, add_product
from lorakit.networks.lora import LoRAModule
from lorakit.networks.network import ParameterGroup
from tests.networks.test_lora import LAYERS, drawn, error, laid_out, make_adapter, reference

FORMATS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]


def flattened(adapter: LoRAModule, dtype: torch.dtype = torch.float32) -> FlatParameters:
    """The adapter's factors in flat buffers, which it computes with."""
    flat = FlatParameters([ParameterGroup("unet", "unet", (adapter.lora_down, adapter.lora_up), 1e-3)], dtype)
    adapter.use_flat(flat)
    return flat


class Elementwise(OptimizerConfig):
    """An optimizer that treats each number by itself."""

    elementwise = True


class PerParameter(OptimizerConfig):
    """One that does not."""


def test_parameters_and_gradients_are_views() -> None:
    """Numbers stay what they were, and what is done to the buffers is done to the parameters, and vice versa."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((2, 3), (5,), (4, 1, 1))]
    before = [parameter.detach().clone() for parameter in parameters]
    groups = [ParameterGroup("a", "unet", tuple(parameters[:2]), 1.0), ParameterGroup("b", "unet", (parameters[2],), 2)]
    flat = FlatParameters(groups)
    assert all(map(torch.equal, parameters, before))
    flat.weights.mul_(2)
    flat.gradients.fill_(3)
    assert all(torch.equal(now, 2 * then) for now, then in zip(parameters, before, strict=True))
    assert all(parameter.grad.eq(3).all() for parameter in parameters)
    with torch.no_grad():
        parameters[1].zero_()
    assert flat.weights[6:11].eq(0).all()


def test_elementwise_optimizers_get_each_group_as_one_parameter() -> None:
    """Others get the parameters themselves; both ways the groups keep names, parts and learning rates."""
    parameters = [nn.Parameter(torch.randn(4, 2)) for _ in range(5)]
    groups = [
        ParameterGroup("a", "unet", tuple(parameters[:2]), 1.0),
        ParameterGroup("b", "te", tuple(parameters[2:]), 2),
    ]
    flat = FlatParameters(groups)
    assert list(flat.groups_for(PerParameter())) == groups
    whole = flat.groups_for(Elementwise())
    assert [(own.name, own.part, own.lr, len(own.parameters)) for own in whole] == [
        ("a", "unet", 1, 1),
        ("b", "te", 2, 1),
    ]
    flat.gradients.fill_(1)
    torch.optim.SGD([{"params": own.parameters, "lr": own.lr} for own in whole]).step()
    for number, parameter in enumerate(parameters):
        other = flat.weights[8 * number : 8 * number + 8].view(4, 2)
        assert torch.equal(parameter, other)
    assert all(own.parameters[0].grad.eq(1).all() for own in whole)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_added_to_the_buffers(layer: str, layout: str) -> None:
    """Two backward passes leave the sum of both gradients, which are those of float64; nothing is left elsewhere."""
    adapter, x = make_adapter(layer)
    flat = flattened(adapter)
    expected = torch.zeros_like(flat.gradients, dtype=torch.float64)
    for scale in (1.0, 2.0):
        own = laid_out(scale * x, layout).requires_grad_()
        out = adapter(own)
        grad = laid_out(torch.randn_like(out), layout)
        out.backward(grad)
        correct_out, correct_x, *factors = reference(adapter, own, grad)
        expected += torch.cat([factor.flatten() for factor in factors])
        assert error(out, correct_out) < 1e-5
        assert error(own.grad, correct_x) < 1e-5
    flat.collect()
    assert error(flat.gradients, expected) < 1e-5
    assert adapter.lora_up.grad.data_ptr() == flat.gradients[adapter.lora_down.numel() :].data_ptr()


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3", "strided 3x3"])
@pytest.mark.parametrize(("dtype", "tolerance"), FORMATS)
def test_any_size_and_format(kind: str, number: int, dtype: torch.dtype, tolerance: float) -> None:
    """At any rank, size, batch and precision the gradients are those of float64, and as exact as autograd's."""
    torch.manual_seed(number)
    layer, rank, shape = drawn(kind, number)
    adapter = LoRAModule("key", layer, rank, 2.0).to(dtype)
    nn.init.normal_(adapter.lora_up, std=0.1)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    out = adapter(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    plain = [adapter.lora_down.grad.clone(), adapter.lora_up.grad.clone(), x.grad.clone()]
    x.grad = None
    flat = flattened(adapter, dtype)
    adapter(x).backward(grad)
    flat.collect()
    own = [adapter.lora_down.grad, adapter.lora_up.grad, x.grad]
    _, correct_x, *correct = reference(adapter, x, grad)
    for found, other, right in zip(own, plain, (*correct, correct_x), strict=True):
        assert error(found, right) < tolerance
        assert error(found, right) <= 1.001 * error(other, right) + 1e-6


def test_the_copy_follows_the_parameters_when_it_is_refreshed() -> None:
    """In bfloat16 layers compute with the numbers of the last refresh; in float32 always with the present ones."""
    for dtype, stale in ((torch.bfloat16, True), (torch.float32, False)):
        adapter, x = make_adapter("linear")
        adapter = adapter.to(dtype)
        flat = flattened(adapter, dtype)
        before = adapter(x.to(dtype))
        flat.weights.mul_(2)
        assert torch.equal(adapter(x.to(dtype)), before) == stale
        flat.refresh()
        assert not torch.equal(adapter(x.to(dtype)), before)


def test_checkpointing_adds_once() -> None:
    """A layer that runs twice for its backward pass adds its gradient once."""
    adapter, x = make_adapter("linear")
    flat = flattened(adapter)
    grad = torch.randn(2, 6, 5)
    checkpoint(adapter, x, use_reentrant=False).backward(grad)
    _, _, *factors = reference(adapter, x, grad)
    assert error(flat.gradients, torch.cat([factor.flatten() for factor in factors])) < 1e-5


def test_compiled_layers_leave_gradients_to_autograd() -> None:
    """A compiled layer's gradients are the same."""
    adapter, x = make_adapter("linear")
    flat = flattened(adapter)
    torch.compile(adapter, backend="eager", fullgraph=True)(x).backward(torch.ones(2, 6, 5))
    _, _, *factors = reference(adapter, x, torch.ones(2, 6, 5))
    assert error(flat.gradients, torch.cat([factor.flatten() for factor in factors])) < 1e-5


def test_layers_in_another_format_leave_gradients_to_autograd() -> None:
    """Autocast and inputs of another format are computed as they are without flat buffers."""
    adapter, x = make_adapter("linear")
    flat = flattened(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        out = adapter(x)
    assert out.dtype == torch.bfloat16
    out.float().backward(torch.ones(2, 6, 5))
    _, _, *factors = reference(adapter, x, torch.ones(2, 6, 5))
    assert error(flat.gradients, torch.cat([factor.flatten() for factor in factors])) < 2e-2


def test_products_are_summed_in_place() -> None:
    """Of matrices and of stacks, in any layout."""
    left, right = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    for a, b in ((left[0], right[0]), (left, right), (left.mT.contiguous().mT, right)):
        out = torch.ones(*a.shape[:-1], 6)
        add_product(out, a, b)
        torch.testing.assert_close(out, 1 + a @ b)
