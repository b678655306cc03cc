"""Layers whose weights are kept in fewer bits: their outputs and gradients, and how large they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.memory.quantization import QuantizedLayer, quantize
from lorakit.models.memory.weight_formats import FORMATS
from lorakit.networks.lora import LoRAModule

CPU = torch.device("cpu")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 48), (3, 5, 64)),
    "linear without bias": (lambda: nn.Linear(64, 48, bias=False), (4, 64)),
    "1x1 convolution": (lambda: nn.Conv2d(32, 48, 1), (2, 32, 4, 5)),
    "3x3 convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 4)),
    "strided 3x3 convolution": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 7, 6)),
}
MEAN_ERRORS = {"fp8": 0.026, "int8": 0.006, "nf4": 0.08}
"""Root mean square of what the formats are off by, of weights as these layers start with, evenly spread."""


def make(layer: str, weight_format: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """A frozen layer, the same kept in fewer bits, and an input."""
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    whole = build().to(dtype).requires_grad_(False)
    small = copy.deepcopy(whole)
    quantize(small, weight_format, CPU)
    return whole, small, torch.randn(shape).to(dtype)


def exact_weight(layer: nn.Module) -> Tensor:
    """The weight that a layer in fewer bits stands for, in float64."""
    return layer.format.unpack(dict(layer.named_buffers()), layer.shape, torch.float64)


def compute(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer does, with another weight, in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), weight, bias)
    return F.conv2d(x.double(), weight, bias, layer.stride, layer.padding)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the L2 norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("layer", LAYERS)
def test_output_is_near_the_whole_layer(layer: str, weight_format: str) -> None:
    """The output is that of the weight that is kept, and off from the whole layer's by the format's mean error."""
    whole, small, x = make(layer, weight_format)
    assert error(small(x), compute(whole, exact_weight(small), x)) < 1e-6
    assert MEAN_ERRORS[weight_format] / 2 < error(small(x), whole(x).double()) < MEAN_ERRORS[weight_format] * 1.5


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("layer", LAYERS)
def test_input_gradient(layer: str, weight_format: str) -> None:
    """The gradient of the input is that of the weight that is kept, in float64, and only the input asks for one."""
    whole, small, x = make(layer, weight_format)
    out = small(x.requires_grad_())
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, x, grad)
    leaf = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(compute(whole, exact_weight(small), leaf), leaf, grad.double())
    assert error(actual, expected) < 1e-6
    assert actual.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("layer", LAYERS)
def test_adapters(layer: str, weight_format: str, dtype: torch.dtype) -> None:
    """A LoRA on it has output and gradients of the weight that is kept + scale·U·D, in float64."""
    whole, small, x = make(layer, weight_format, dtype)
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
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("layer", LAYERS)
def test_memory(layer: str, weight_format: str, adapted: bool) -> None:
    """What is kept is as small as promised, and neither pass keeps a whole weight for the other."""
    whole, small, x = make(layer, weight_format)
    weights, outputs = whole.weight.numel(), len(whole.weight)
    assert [name for name, _ in small.named_parameters()] == ([] if whole.bias is None else ["bias"])
    held = sum(tensor.nbytes for tensor in small.buffers())
    blocks = math.ceil(weights / 64)
    assert held == (blocks * (32 + 4) + 256 * 2 * 4 if weight_format == "nf4" else weights + 4 * outputs)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    module = LoRAModule("key", small, 1, 1.0) if adapted else small
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x.requires_grad_())
    assert weights not in [tensor.numel() for tensor in saved]
    assert adapted == bool(saved)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_casts_move_no_bit(weight_format: str) -> None:
    """A cast of the model around it changes the format that it computes in, and not what it keeps."""
    _, small, x = make("linear", weight_format)
    before = {name: tensor.clone() for name, tensor in small.named_buffers()}
    model = nn.Sequential(small).to(torch.bfloat16)
    assert model(x.to(torch.bfloat16)).dtype == small.weight.dtype == torch.bfloat16
    after = dict(small.named_buffers())
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].float(), tensor.float())


def test_autocast() -> None:
    """Under autocast, a layer in float32 has output and gradients of autocast's number format, near float32's."""
    for weight_format in FORMATS:
        _, small, x = make("linear", weight_format)
        adapter = LoRAModule("key", small, 3, 2.0)
        nn.init.normal_(adapter.lora_up)
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = adapter(x.requires_grad_())
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, adapter.lora_down))))
        assert results[1][0].dtype == torch.bfloat16
        for exact, cast in zip(*results, strict=True):
            assert error(cast, exact.double()) < 2e-2


def test_other_layers_stay() -> None:
    """Layers of other kinds, and those that are in fewer bits already, are left as they are."""
    circular, norm = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.LayerNorm(4)
    small = make("linear", "fp8")[1]
    stored = small.stored
    for layer in (circular, norm, small):
        quantize(layer, "nf4", CPU)
    assert not any(isinstance(layer, QuantizedLayer) for layer in (circular, norm))
    assert small.stored is stored
