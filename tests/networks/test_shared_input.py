from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.memory.quantization import quantize
from lorakit.models.weights.load import open_tensors
from lorakit.networks.dropout import DropoutRates
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.lora import LoRAModule, LoRANetwork, LRFactors
from tests.networks.test_lora import error

FORMATS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]


class Projections(nn.Module):
    """Queries, keys and values of one input, and a layer that reads something else."""

    def __init__(self, widths: Sequence[int], *, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, width, bias) for width in widths)
        self.other = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs of all."""
        return [*(layer(x) for layer in self.layers), self.other(x)]


def adapted(
    ranks: Sequence[int] = (4, 4, 4),
    widths: Sequence[int] = (8, 8, 8),
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    up_factor: float | None = None,
) -> tuple[Projections, LoRANetwork, FlatParameters]:
    """The layers, the network that adapts them, and its flat buffers; factors have an effect."""
    torch.manual_seed(0)
    model = Projections(widths, bias=bias).to(dtype).requires_grad_(False)
    targets = [
        AdaptationTarget(f"layer_{i}", "unet", model, f"layers.{i}", shared_input="x") for i in range(len(widths))
    ]
    targets.append(AdaptationTarget("other", "unet", model, "other"))
    sizes = dict(zip((target.key for target in targets), (*ranks, 4), strict=True))
    network = LoRANetwork(
        targets,
        lambda target: LoRAModule(target.key, target.module, sizes[target.key], 2.0),
        DropoutRates(neuron=dropout),
        LRFactors(denoiser_up=up_factor),
    ).attach()
    network.initialize(0)
    for adapter in network.adapters:
        nn.init.normal_(adapter.lora_up, std=0.3)
    flat = FlatParameters(network.train().parameter_groups(lambda _: 1e-3), dtype)
    network.use_flat(flat)
    return model, network, flat


def reference(network: LoRANetwork, x: Tensor, grads: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """Outputs, and gradients of the input and of all factors, in float64 by autograd, of W + scale·U·D."""
    leaf = x.detach().double().requires_grad_()
    factors = [own.detach().double().requires_grad_() for a in network.adapters for own in (a.lora_down, a.lora_up)]
    outputs = []
    for adapter, down, up in zip(network.adapters, factors[::2], factors[1::2], strict=True):
        base = adapter.base
        bias = None if base.bias is None else base.bias.double()
        outputs.append(nn.functional.linear(leaf, base.weight.double() + adapter.scale * up @ down, bias))
    found = torch.autograd.grad(outputs, [leaf, *factors], [grad.double() for grad in grads])
    return outputs, list(found)


def computed(model: Projections, network: LoRANetwork, flat: FlatParameters, x: Tensor) -> tuple[float, float]:
    """How far outputs, and gradients, of a step are off."""
    x = x.detach().requires_grad_()
    flat.gradients.zero_()
    flat.refresh()
    outputs = model(x)
    grads = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, grads)
    flat.collect()
    expected, gradients = reference(network, x, grads)
    own = [x.grad, *(factor.grad for a in network.adapters for factor in (a.lora_down, a.lora_up))]
    off = [error(found, right) for found, right in zip(own, gradients, strict=True)]
    return max(map(error, outputs, expected)), max(off)


def shared(network: LoRANetwork) -> list[int]:
    """How many adapters each one is computed together with."""
    return [len(adapter.shared.adapters) if adapter.shared else 1 for adapter in network.adapters]


@pytest.mark.parametrize("shape", [(1, 7, 12), (2, 5, 12), (8, 3, 12), (6, 12)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), FORMATS)
def test_equals_the_merged_weights_in_float64(
    dtype: torch.dtype, tolerance: float, bias: bool, shape: tuple[int, ...]
) -> None:
    """Outputs and all gradients of layers that are computed together are those of W + scale·U·D."""
    model, network, flat = adapted(bias=bias, dtype=dtype)
    assert shared(network) == [3, 3, 3, 1]
    for _ in range(2):
        off = computed(model, network, flat, torch.randn(shape, dtype=dtype))
        assert max(off) < tolerance


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 16, 31, 64, 128])
def test_any_rank(rank: int) -> None:
    """Large and odd ranks, too."""
    model, network, flat = adapted((rank,) * 3)
    assert max(computed(model, network, flat, torch.randn(2, 5, 12))) < 1e-5


@pytest.mark.parametrize(
    ("ranks", "widths", "expected"),
    [
        ((4, 4, 2), (8, 8, 8), [2, 2, 1, 1]),
        ((4, 2, 1), (8, 8, 8), [1, 1, 1, 1]),
        ((4, 4, 4), (8, 6, 8), [2, 1, 2, 1]),
        ((2, 3, 2, 3), (8, 8, 8, 8), [2, 2, 2, 2, 1]),
    ],
)
def test_layers_of_other_sizes_are_computed_apart(
    ranks: Sequence[int], widths: Sequence[int], expected: list[int]
) -> None:
    """Only factors of the same shapes lie side by side; the results are right for all."""
    model, network, flat = adapted(ranks, widths)
    assert shared(network) == expected
    assert max(computed(model, network, flat, torch.randn(2, 5, 12))) < 1e-5


def test_other_learning_rates_of_up_factors() -> None:
    """With LoRA+ both kinds of factors lie in groups of their own, and layers still share."""
    model, network, flat = adapted(up_factor=4.0)
    assert shared(network) == [3, 3, 3, 1]
    assert [(group.name, group.lr) for group in flat.groups] == [("unet", 1e-3), ("unet plus", 4e-3)]
    assert max(computed(model, network, flat, torch.randn(2, 5, 12))) < 1e-5


def test_parameters_lie_in_one_order_whatever_is_computed_together() -> None:
    """Optimizer states hold them in it, and a run may be resumed with other memory settings."""
    model, network, _ = adapted()
    together = [id(own) for group in network.parameter_groups(lambda _: 1e-3) for own in group.parameters]
    network._targets = [evolve(target, shares_within=target.path) for target in network._targets]
    apart = network.parameter_groups(lambda _: 1e-3)
    assert [id(own) for group in apart for own in group.parameters] == together
    flat = FlatParameters(apart)
    for adapter in network.adapters:
        adapter.shared = None
    network.use_flat(flat)
    assert shared(network) == [1, 1, 1, 1]
    assert max(computed(model, network, flat, torch.randn(2, 5, 12))) < 1e-5


def test_frozen_factors() -> None:
    """An adapter with a factor that is not trained is computed by itself, and the others together."""
    model, network, _ = adapted()
    for adapter in network.adapters:
        adapter.shared = None
    network.adapters[1].lora_down.requires_grad_(False)
    flat = FlatParameters(network.parameter_groups(lambda _: 1e-3))
    network.use_flat(flat)
    assert shared(network) == [2, 1, 2, 1]
    x = torch.randn(2, 5, 12)
    outputs = model(x)
    grads = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, grads)
    expected, _ = reference(network, x, grads)
    assert max(map(error, outputs, expected)) < 1e-5


def test_dropout_is_drawn_for_each_adapter() -> None:
    """With dropout nothing is shared, as each adapter has masks of its own."""
    _, network, _ = adapted(dropout=0.5)
    assert shared(network) == [1, 1, 1, 1]


def test_quantized_base_weights() -> None:
    """Base weights in another format are used one by one."""
    model, network, flat = adapted()
    for adapter in network.adapters:
        quantize(adapter.base, "int8", torch.device("cpu"))
    network.use_flat(flat)
    assert network.adapters[0].shared.weights is None
    assert max(computed(model, network, flat, torch.randn(2, 5, 12))) < 1e-5


def test_base_weights_lie_side_by_side_and_stay_what_they_were() -> None:
    """Base layers keep their weights, bit for bit; where one is moved later, weights are used one by one."""
    torch.manual_seed(0)
    before = [layer.weight.clone() for layer in Projections((8, 8, 8), bias=False).layers]
    model, network, flat = adapted()
    group = network.adapters[0].shared
    assert torch.equal(group.weights, torch.stack(before))
    assert all(torch.equal(a.base.weight, own) for a, own in zip(network.adapters, before, strict=False))
    network.adapters[0].base.weight.data = before[0] + 1
    assert group.weights is None
    assert max(computed(model, network, flat, torch.randn(2, 5, 12))) < 1e-5


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_base_weights_in_a_mapped_file_stay_there(kind: str, tmp_path: Path) -> None:
    """They take no memory besides the file's, and are used one by one."""
    model, network, flat = adapted()
    names = {adapter.key: adapter.base.weight.detach() for adapter in network.adapters}
    file = tmp_path / f"weights.{kind}"
    (save_file if kind == "safetensors" else torch.save)(names, file)
    read = open_tensors(file)
    for adapter in network.adapters:
        adapter.shared = None
        adapter.base.weight.data = read(adapter.key)
    places = [adapter.base.weight.data_ptr() for adapter in network.adapters]
    network.use_flat(flat)
    assert [adapter.base.weight.data_ptr() for adapter in network.adapters] == places
    assert shared(network) == [3, 3, 3, 1]
    assert network.adapters[0].shared.weights is None
    assert max(computed(model, network, flat, torch.randn(2, 5, 12))) < 1e-5


def test_each_input_is_computed_anew() -> None:
    """Another input, another multiplier, or the same input after a step gives outputs of its own."""
    model, network, flat = adapted()
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        first = model(x)
        network.multiplier = 0.5
        half = model(x)
        network.multiplier = 1.0
        flat.weights.mul_(2)
        later = model(x)
        other = model(x + 1)
    for outputs in (half, later, other):
        assert not any(map(torch.equal, first, outputs))
    base = [adapter.base(x) for adapter in network.adapters]
    for out, own, whole in zip(half, base, first, strict=True):
        torch.testing.assert_close(out, (own + whole) / 2)


def test_a_pass_that_was_broken_off_leaves_nothing_behind() -> None:
    """What was computed for layers that were not called is not handed out in the next pass."""
    model, _, flat = adapted()
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        model.layers[0](x)
        flat.weights.mul_(2)
        found = model(x)
    assert all(torch.equal(own, again) for own, again in zip(found, model(x), strict=True))


def test_inputs_without_gradients() -> None:
    """Where only the factors want gradients, as for a caption, they get them."""
    model, network, _ = adapted()
    x = torch.randn(2, 5, 12)
    outputs = model(x)
    grads = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, grads)
    _, (_, *expected) = reference(network, x, grads)
    own = [factor.grad for a in network.adapters for factor in (a.lora_down, a.lora_up)]
    assert max(map(error, own, expected)) < 1e-5


def test_outputs_that_are_not_used_have_no_gradient() -> None:
    """Values alone get gradients where only they are used."""
    model, network, _ = adapted()
    model(torch.randn(2, 5, 12))[2].sum().backward()
    assert not network.adapters[0].lora_down.grad.any()
    assert network.adapters[2].lora_up.grad.any()


def test_compiled_layers_are_computed_one_by_one() -> None:
    """A compiler sees the plain operation, which gives the same."""
    model, _, _ = adapted()
    x = torch.randn(2, 5, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    for own, other in zip(compiled, model(x), strict=True):
        torch.testing.assert_close(own, other)
