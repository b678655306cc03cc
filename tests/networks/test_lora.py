from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.errors import AdapterError
from lorakit.networks.lora import LoRAModule
from lorakit.networks.lora_function import low_rank_operation
from lorakit.utils.rng import keyed_generator

RANK, ALPHA = 3, 2.0

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (2, 6, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (2, 6, 7)),
    "linear on vectors": (lambda: nn.Linear(7, 5), (4, 7)),
    "1x1 convolution": (lambda: nn.Conv2d(7, 5, 1), (3, 7, 4, 6)),
    "1x1 convolution, one image": (lambda: nn.Conv2d(7, 5, 1), (1, 7, 4, 6)),
    "3x3 convolution": (lambda: nn.Conv2d(7, 5, 3, padding=1), (2, 7, 4, 6)),
    "strided 3x3 convolution": (lambda: nn.Conv2d(7, 5, 3, stride=2, padding=1), (2, 7, 6, 6)),
    "strided 1x1 convolution": (lambda: nn.Conv2d(7, 5, 1, stride=2, bias=False), (2, 7, 6, 6)),
}
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced"]


def make_adapter(layer: str, rank: int = RANK) -> tuple[LoRAModule, Tensor]:
    """An adapter of the layer with both factors away from zero, and an input for it."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    adapter = LoRAModule("key", make(), rank, ALPHA)
    nn.init.normal_(adapter.lora_up)
    return adapter, torch.randn(shape)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, laid out otherwise in memory."""
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x


def merged(adapter: LoRAModule, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The reference: the base layer's operation with the weight W + (alpha/rank)·U·D, in float64, by autograd."""
    base = adapter.base
    update = up.flatten(1) @ down.flatten(1)
    weight = base.weight.double() + adapter.alpha / adapter.rank * update.view(base.weight.shape)
    bias = None if base.bias is None else base.bias.double()
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, base.stride, base.padding)


def reference(adapter: LoRAModule, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of input, down and up factor in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, adapter.lora_down, adapter.lora_up)]
    out = merged(adapter, *leaves)
    return out, *torch.autograd.grad(out, leaves, grad.double())


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the L2 norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_the_merged_weight_in_float64(layer: str, layout: str) -> None:
    """Output and all gradients are those of W + scale·U·D, whatever the memory layout of input and gradient."""
    adapter, x = make_adapter(layer)
    x = laid_out(x, layout).requires_grad_()
    out = adapter(x)
    grad = laid_out(torch.randn_like(out), layout)
    out.backward(grad)
    expected = reference(adapter, x, grad)
    for actual, correct in zip((out, x.grad, adapter.lora_down.grad, adapter.lora_up.grad), expected, strict=True):
        assert error(actual, correct) < 1e-5


def drawn(kind: str, number: int) -> tuple[nn.Module, int, tuple[int, ...]]:
    """A layer with odd numbers of channels, a rank from 1 to 128, and an input of 1 to 8 images or texts."""
    draw = keyed_generator("layer", kind, number)
    inputs, outputs, batch, height, width = (int(n) for n in draw.integers((3, 3, 1, 3, 3), (150, 150, 9, 12, 12)))
    rank = int(draw.choice([1, 2, 3, 8, 13, 16, 31, 64, 128]))
    kernel, stride = {"1x1": (1, 1), "3x3": (3, 1), "strided 3x3": (3, 2), "linear": (0, 0)}[kind]
    if kernel:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
        return layer, rank, (batch, inputs, height, width)
    return nn.Linear(inputs, outputs, bias=bool(number % 2)), rank, (batch, height * width, inputs)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3", "strided 3x3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_any_size(kind: str, number: int, dtype: torch.dtype, tolerance: float) -> None:
    """At any rank, size and batch, in every precision and layout, output and gradients are those of float64."""
    torch.manual_seed(number)
    layer, rank, shape = drawn(kind, number)
    adapter = LoRAModule("key", layer, rank, ALPHA)
    nn.init.normal_(adapter.lora_up, std=0.1)
    adapter = adapter.to(dtype)
    x = laid_out(torch.randn(shape, dtype=dtype), LAYOUTS[number % len(LAYOUTS)]).requires_grad_()
    out = adapter(x)
    grad = laid_out(torch.randn_like(out), LAYOUTS[number // 2 % len(LAYOUTS)])
    out.backward(grad)
    expected = reference(adapter, x, grad)
    for actual, correct in zip((out, x.grad, adapter.lora_down.grad, adapter.lora_up.grad), expected, strict=True):
        assert error(actual, correct) < tolerance


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_the_derivatives(layer: str, layout: str) -> None:
    """The gradients are what finite differences say, also under a dropout mask."""
    adapter, x = make_adapter(layer)
    base = adapter.base.double()

    def mask(rows: Tensor) -> Tensor:
        return torch.linspace(0, 2, rows.numel(), dtype=rows.dtype).view(rows.shape)

    for draw_mask in (None, mask):
        leaves = [t.detach().double() for t in (laid_out(x, layout), adapter.lora_down, adapter.lora_up)]
        for leaf in leaves:
            leaf.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, down, up: low_rank_operation(x, down, up, base, 0.7, draw_mask, None),  # noqa: B023
            leaves,
            fast_mode=True,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["linear", "1x1 convolution", "strided 3x3 convolution"])
def test_low_precision_base(layer: str, dtype: torch.dtype) -> None:
    """On a half-precision model the output stays half, the masters and their gradients are float32 and about right."""
    adapter, x = make_adapter(layer)
    adapter = adapter.to(dtype)
    assert adapter.base.weight.dtype == dtype
    assert adapter.lora_down.dtype == adapter.lora_up.dtype == torch.float32
    x = x.to(dtype).requires_grad_()
    out = adapter(x)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    out.backward(grad)
    assert adapter.lora_down.grad.dtype == torch.float32
    expected = reference(adapter, x, grad)
    for actual, correct in zip((out, x.grad, adapter.lora_down.grad, adapter.lora_up.grad), expected, strict=True):
        assert error(actual, correct) < 2e-2


def test_a_cast_moves_no_master() -> None:
    """Casting the model around an adapter down and up again leaves the float32 factors as they were, bit for bit."""
    adapter, _ = make_adapter("linear")
    before = adapter.lora_up.detach().clone()
    nn.Sequential(adapter).to(torch.bfloat16).float()
    assert torch.equal(adapter.lora_up, before)


@pytest.mark.parametrize("layer", ["linear", "1x1 convolution", "strided 3x3 convolution"])
def test_autocast(layer: str) -> None:
    """Under autocast it computes in autocast's format, like the base layer; backward is right inside and outside."""
    adapter, x = make_adapter(layer)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = adapter(x)
        assert out.dtype == adapter.base(x).dtype == torch.bfloat16
    grad = torch.randn_like(out)
    expected = reference(adapter, x, grad)
    leaves = (x, adapter.lora_down, adapter.lora_up)
    outside = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        inside = torch.autograd.grad(out, leaves, grad)
    for one, other, correct in zip(outside, inside, expected[1:], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32
        assert error(one, correct) < 2e-2


def test_backward_under_autocast_keeps_float32() -> None:
    """A float32 forward pass has a float32 backward pass, even where autocast is on by then."""
    adapter, x = make_adapter("linear")
    out = adapter(x)
    grad = torch.randn_like(out)
    with torch.autocast("cpu", torch.bfloat16):
        out.backward(grad)
    assert error(adapter.lora_up.grad, reference(adapter, x, grad)[3]) < 1e-5


@pytest.mark.parametrize("layer", ["linear", "1x1 convolution", "strided 3x3 convolution"])
def test_keeps_only_input_and_rank_r_activations(layer: str) -> None:
    """What is kept for the backward pass: the input itself, the rank-r activations, and weights; no other copy."""
    adapter, x = make_adapter(layer)
    adapter, x = adapter.to(torch.bfloat16), x.to(torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = adapter(x)
    owned = {x.data_ptr(), adapter.base.weight.data_ptr()}
    positions = out.numel() // 5
    factors = adapter.lora_down.numel() + adapter.lora_up.numel()
    copies = [tensor for tensor in saved if tensor.data_ptr() not in owned]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    assert sum(tensor.numel() for tensor in copies) == positions * RANK + factors
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved)


def test_no_gradient_for_the_base_layer_and_an_input_that_needs_none() -> None:
    """Nothing but the factors gets a gradient when the input needs none, and the base layer is frozen."""
    adapter, x = make_adapter("linear")
    computed: list[Any] = []
    out = adapter(x)
    out.grad_fn.register_hook(lambda grads, _: computed.extend(grads))
    out.sum().backward()
    assert [gradient is None for gradient in computed[:3]] == [True, False, False]
    assert not any(p.requires_grad for p in adapter.base.parameters())
    assert all(p.grad is None for p in adapter.base.parameters())


@pytest.mark.parametrize("layer", ["linear", "1x1 convolution", "strided 3x3 convolution"])
def test_gradient_checkpointing(layer: str) -> None:
    """Recomputing the layer in the backward pass gives the same gradients, bit for bit."""
    adapter, x = make_adapter(layer)
    x.requires_grad_()
    leaves = (x, adapter.lora_down, adapter.lora_up)
    plain = torch.autograd.grad(adapter(x).square().sum(), leaves)
    recomputed = torch.autograd.grad(checkpoint(adapter, x, use_reentrant=False).square().sum(), leaves)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_effect_at_first_and_at_multiplier_zero(layer: str) -> None:
    """A new adapter, and any adapter at multiplier 0, gives the base layer's output, bit for bit."""
    adapter, x = make_adapter(layer)
    assert not torch.equal(adapter(x), adapter.base(x))
    adapter.multiplier = 0.0
    assert torch.equal(adapter(x), adapter.base(x))
    adapter.multiplier = 1.0
    adapter.initialize(5)
    assert torch.equal(adapter(x), adapter.base(x))


def test_initial_weights_depend_on_seed_and_key_alone() -> None:
    """Same seed and key, same weights, whatever the global generator did; another seed or key, other weights."""

    def down(seed: int, key: str) -> Tensor:
        torch.manual_seed(int(torch.randint(1000, ())))
        adapter = LoRAModule(key, nn.Linear(64, 8), 4, 1.0)
        adapter.initialize(seed)
        return adapter.lora_down.detach()

    assert torch.equal(down(1, "a"), down(1, "a"))
    assert not torch.equal(down(1, "a"), down(2, "a"))
    assert not torch.equal(down(1, "a"), down(1, "b"))


@pytest.mark.parametrize("base", [nn.Linear(4096, 4), nn.Conv2d(512, 4, 3)])
def test_initial_weights_are_kaiming_uniform(base: nn.Module) -> None:
    """D is distributed as torch's kaiming_uniform_ with a = √5: uniform between ±1/√inputs."""
    adapter = LoRAModule("key", base, 16, 1.0)
    other = torch.empty_like(adapter.lora_down)
    nn.init.kaiming_uniform_(other, a=5**0.5, generator=torch.Generator().manual_seed(0))
    ours = adapter.lora_down.detach()
    assert float(ours.std() / other.std()) == pytest.approx(1, abs=0.02)
    assert float(ours.abs().max() / other.abs().max()) == pytest.approx(1, abs=0.01)
    assert abs(float(ours.mean())) < 0.02 * float(ours.std()) * 4


@pytest.mark.parametrize(
    "base",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1), nn.Conv1d(4, 4, 1)],
)
def test_layers_it_cannot_adapt_are_refused(base: nn.Module) -> None:
    """A layer whose computation it would get wrong is an error that names it."""
    with pytest.raises(AdapterError, match="lora_unet_x cannot be adapted"):
        LoRAModule("lora_unet_x", base, 4, 1.0)
