"""Layers whose weights are kept in 8 bits: how exact, how large, and what they give for training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.float8 import FLOAT8, Float8Layer, keep_in_8_bits
from lorakit.networks.lora import LoRAModule

CPU = torch.device("cpu")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 48), (3, 5, 64)),
    "linear without bias": (lambda: nn.Linear(64, 48, bias=False), (4, 64)),
    "1x1 convolution": (lambda: nn.Conv2d(32, 48, 1), (2, 32, 4, 5)),
    "3x3 convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 4)),
    "strided 3x3 convolution": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 7, 6)),
}


def make(layer: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """A frozen layer, the same kept in 8 bits, and an input."""
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    whole = build().to(dtype).requires_grad_(False)
    small = copy.deepcopy(whole)
    keep_in_8_bits(small, CPU)
    return whole, small, torch.randn(shape).to(dtype)


def exact_weight(layer: nn.Module) -> Tensor:
    """The weight that an 8-bit layer stands for, in float64."""
    return layer.stored.double() * layer.scale.double()


def compute(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer does, with another weight, in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), weight, bias)
    return F.conv2d(x.double(), weight, bias, layer.stride, layer.padding)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the L2 norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_no_weight_is_further_off_than_the_format_says(dtype: torch.dtype, size: float) -> None:
    """Weights of any size, and of very different ones in a channel, are off by 1/16 or a tiny share of the largest."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 16)
    layer.weight.data *= size * torch.logspace(-6, 0, 512)
    layer.weight.data[3] = 0
    layer = layer.to(dtype)
    weight = layer.weight.detach().double()
    keep_in_8_bits(layer, CPU)
    bound = torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) / 458_752)
    assert ((exact_weight(layer) - weight).abs() <= bound * (1 + 1e-6)).all()
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight, exact_weight(layer).to(dtype))


@pytest.mark.parametrize("layer", LAYERS)
def test_output_is_near_the_whole_layer(layer: str) -> None:
    """The output is that of the dequantised weight, and within e4m3's mean error of the whole layer's."""
    whole, small, x = make(layer)
    assert error(small(x), compute(whole, exact_weight(small), x)) < 1e-6
    # Rounding to three bits after the leading one is off by 2.6 % (root mean square), at most 6.25 %.
    assert 0.005 < error(small(x), whole(x).double()) < 0.04


def test_is_more_exact_than_a_bare_cast() -> None:
    """With small weights, as base models have, the scales make what a cast to float8 loses survive."""
    torch.manual_seed(0)
    layer = nn.Linear(320, 320)
    weight = layer.weight.data.normal_(0, 0.005).double()
    keep_in_8_bits(layer, CPU)
    assert error(layer.weight, weight) < 0.03
    assert error(weight.to(FLOAT8), weight) > 0.1


@pytest.mark.parametrize("layer", LAYERS)
def test_input_gradient(layer: str) -> None:
    """The gradient of the input is that of the dequantised weight in float64, and only the input asks for one."""
    whole, small, x = make(layer)
    out = small(x.requires_grad_())
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, x, grad)
    leaf = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(compute(whole, exact_weight(small), leaf), leaf, grad.double())
    assert error(actual, expected) < 1e-6
    assert actual.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_adapters(layer: str, dtype: torch.dtype) -> None:
    """A LoRA on it has output and gradients of dequantised weight + scale·U·D in float64."""
    whole, small, x = make(layer, dtype)
    adapter = LoRAModule("key", small, 3, 2.0)
    assert adapter.base is small
    nn.init.normal_(adapter.lora_up)
    out = adapter(x.requires_grad_())
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    actual = out, *torch.autograd.grad(out, (x, adapter.lora_down, adapter.lora_up), grad)
    x64, down, up = (t.detach().double().requires_grad_() for t in (x, adapter.lora_down, adapter.lora_up))
    base = exact_weight(small)
    reference = compute(whole, base + adapter.scale * (up.flatten(1) @ down.flatten(1)).view(base.shape), x64)
    expected = reference, *torch.autograd.grad(reference, (x64, down, up), grad.double())
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_memory(layer: str, adapted: bool) -> None:
    """A weight takes one byte and a scale per channel, and neither pass keeps a whole one for the other."""
    whole, small, x = make(layer)
    assert small.stored.dtype == FLOAT8
    held = sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()) if t is not small.bias)
    assert held == whole.weight.numel() + 4 * len(whole.weight)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    module = LoRAModule("key", small, 1, 1.0) if adapted else small
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x.requires_grad_())
    assert whole.weight.numel() not in [tensor.numel() for tensor in saved]
    assert adapted == bool(saved)


def test_casts_move_no_bit() -> None:
    """A cast of the model around it changes the format that it computes in, and not what it keeps."""
    _, small, x = make("linear")
    stored, scale = small.stored.clone(), small.scale.clone()
    model = nn.Sequential(small).to(torch.bfloat16)
    assert model(x.to(torch.bfloat16)).dtype == small.weight.dtype == torch.bfloat16
    assert torch.equal(small.stored.float(), stored.float())
    assert small.stored.dtype == FLOAT8
    assert torch.equal(small.scale, scale)
    assert small.scale.dtype == torch.float32


def test_other_layers_stay() -> None:
    """Layers of other kinds, and those that are in 8 bits already, are left as they are."""
    circular, norm, small = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.LayerNorm(4), make("linear")[1]
    stored = small.stored
    for layer in (circular, norm, small):
        keep_in_8_bits(layer, CPU)
    assert not any(isinstance(layer, Float8Layer) for layer in (circular, norm))
    assert small.stored is stored
