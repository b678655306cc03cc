"""DoRA against the formula in float64 and against PEFT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.api.components import NetworkConfig
from lorakit.builtin.networks import C3LierConfig
from lorakit.networks.dora import DoRAModule
from lorakit.networks.network import Network
from lorakit.testing.contracts import NetworkContract
from tests.networks.test_dropout import seeds
from tests.networks.test_lora import ALPHA, LAYERS, LAYOUTS, RANK, error, laid_out

KINDS = ["linear", "1x1 convolution", "strided 3x3 convolution"]


def make_adapter(layer: str, rank: int = RANK) -> tuple[DoRAModule, Tensor]:
    """An adapter of the layer, its factors and magnitudes away from where they start, and an input for it."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    adapter = DoRAModule("key", make(), rank, ALPHA)
    nn.init.normal_(adapter.lora_up)
    with torch.no_grad():
        adapter.dora_scale.mul_(0.5 + torch.rand_like(adapter.dora_scale))
    return adapter, torch.randn(shape)


def leaves_of(adapter: DoRAModule, x: Tensor) -> tuple[Tensor, ...]:
    """What gets a gradient."""
    return x, adapter.lora_down, adapter.lora_up, adapter.dora_scale


def written_out(adapter: DoRAModule, *leaves: Tensor) -> Tensor:
    """m/‖W + sUD‖·(W + sUD)·x + b in float64, with the full matrix, the norm a constant to autograd."""
    x, down, up, magnitude = leaves
    base = adapter.base
    update = adapter.alpha / adapter.rank * up.flatten(1) @ down.flatten(1)
    weight = base.weight.double() + update.view(base.weight.shape)
    norm = weight.detach().flatten(1).norm(dim=1).view_as(magnitude)
    weight = magnitude / norm * weight
    bias = None if base.bias is None else base.bias.double()
    return F.linear(x, weight, bias) if isinstance(base, nn.Linear) else F.conv2d(x, weight, bias, *geometry(base))


def geometry(base: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stride and padding."""
    return base.stride, base.padding


def reference(adapter: DoRAModule, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of input, both factors and the magnitudes, in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves_of(adapter, x)]
    out = written_out(adapter, *leaves)
    return out, *torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_the_formula_in_float64(layer: str, layout: str) -> None:
    """Output and all gradients are those of the written-out formula, whatever the layout of input and gradient."""
    adapter, x = make_adapter(layer)
    x = laid_out(x, layout).requires_grad_()
    out = adapter(x)
    grad = laid_out(torch.randn_like(out), layout)
    actual = (out, *torch.autograd.grad(out, leaves_of(adapter, x), grad))
    for ours, correct in zip(actual, reference(adapter, x, grad), strict=True):
        assert error(ours, correct) < 1e-5


@pytest.mark.parametrize("layer", ["linear", "1x1 convolution", "3x3 convolution"])
def test_equals_peft(layer: str) -> None:
    """Output and all gradients are those of PEFT's layer with the same factors and magnitudes."""
    from peft import LoraConfig, inject_adapter_in_model

    adapter, x = make_adapter(layer)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True)
    theirs = inject_adapter_in_model(config, nn.Sequential(adapter.base))[0]
    down, up, magnitude = theirs.lora_A.default, theirs.lora_B.default, theirs.lora_magnitude_vector.default
    down.weight.data, up.weight.data = adapter.lora_down.data.clone(), adapter.lora_up.data.clone()
    assert magnitude.weight.numel() == adapter.dora_scale.numel()
    magnitude.weight.data = adapter.dora_scale.data.reshape(magnitude.weight.shape).clone()
    x.requires_grad_()
    out, peft_out = adapter(x), theirs(x)
    grad = torch.randn_like(out)
    ours = (out, *torch.autograd.grad(out, leaves_of(adapter, x), grad))
    peft_leaves = (x, down.weight, up.weight, magnitude.weight)
    for one, other in zip(ours, (peft_out, *torch.autograd.grad(peft_out, peft_leaves, grad)), strict=True):
        assert error(one, other.view_as(one).double()) < 1e-5


def test_starts_as_peft_does() -> None:
    """The magnitudes start as the norms of the base layer's weights, as PEFT's do."""
    from peft import LoraConfig, inject_adapter_in_model

    for layer in ("linear", "3x3 convolution"):
        base = LAYERS[layer][0]()
        adapter = DoRAModule("key", base, RANK, ALPHA)
        config = LoraConfig(r=RANK, target_modules=["0"], use_dora=True)
        theirs = inject_adapter_in_model(config, nn.Sequential(base))[0].lora_magnitude_vector.default.weight
        assert torch.allclose(adapter.dora_scale.flatten(), theirs.flatten(), rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("layer", KINDS)
def test_norms_without_the_full_matrix(layer: str, rank: int) -> None:
    """The norms are those of W + s·U·D in float64, for low and high ranks and for updates of all sizes."""
    adapter, _ = make_adapter(layer, rank)
    for size in (1e-4, 1e-2, 1.0, 100.0):
        adapter.lora_up.data *= size
        update = adapter.scale * adapter.lora_up.double().flatten(1) @ adapter.lora_down.double().flatten(1)
        expected = (adapter.base.weight.double().flatten(1) + update).norm(dim=1)
        assert torch.allclose(adapter._norms().double(), expected, rtol=1e-5)
        adapter.lora_up.data /= size


@pytest.mark.parametrize("layer", LAYERS)
def test_no_effect_at_first_and_at_multiplier_zero(layer: str) -> None:
    """A new adapter, and any at multiplier 0, gives the base layer's output, bit for bit; in bfloat16 as well."""
    for dtype in (torch.float32, torch.bfloat16):
        base, x = LAYERS[layer][0]().to(dtype), torch.randn(LAYERS[layer][1]).to(dtype)
        adapter = DoRAModule("key", base, RANK, ALPHA)
        assert torch.equal(adapter(x), base(x))
        nn.init.normal_(adapter.lora_up)
        assert not torch.equal(adapter(x), base(x))
        adapter.multiplier = 0.0
        assert torch.equal(adapter(x), base(x))


def test_multiplier() -> None:
    """Half the multiplier is half of the way from the base layer's output to the adapted one's."""
    adapter, x = make_adapter("linear")
    full = adapter(x)
    adapter.multiplier = 0.5
    assert torch.allclose(adapter(x), (full + adapter.base(x)) / 2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", KINDS)
def test_low_precision_base(layer: str, dtype: torch.dtype) -> None:
    """On a half-precision model outputs are half, masters and gradients float32, and all is about right."""
    adapter, x = make_adapter(layer)
    adapter = DoRAModule("key", adapter.base.to(dtype), RANK, ALPHA)
    nn.init.normal_(adapter.lora_up)
    x = x.to(dtype).requires_grad_()
    out = adapter(x)
    grad = torch.randn_like(out)
    actual = (out, *torch.autograd.grad(out, leaves_of(adapter, x), grad))
    assert out.dtype == dtype
    assert {leaf.dtype for leaf in actual[2:]} == {torch.float32}
    for ours, correct in zip(actual, reference(adapter, x, grad), strict=True):
        assert error(ours, correct) < 2e-2


def test_magnitudes_are_not_rounded_to_bfloat16() -> None:
    """In a bfloat16 model a change of the magnitudes between two numbers of bfloat16 has the effect that it should."""
    base = nn.Linear(64, 8, bias=False).bfloat16()
    adapter = DoRAModule("key", base, RANK, ALPHA)
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = adapter(x).double().norm()
    adapter.dora_scale.data *= 1 + 3 * 2.0**-8
    assert (adapter(x).double().norm() / before - 1).item() == pytest.approx(3 * 2.0**-8, rel=0.1)


@pytest.mark.parametrize("layer", KINDS)
def test_gradient_checkpointing(layer: str) -> None:
    """Recomputing the layer in the backward pass gives the same gradients, bit for bit."""
    adapter, x = make_adapter(layer)
    leaves = leaves_of(adapter, x.requires_grad_())
    plain = torch.autograd.grad(adapter(x).square().sum(), leaves)
    recomputed = torch.autograd.grad(checkpoint(adapter, x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_keeps_one_output_and_no_full_matrix() -> None:
    """For the backward pass it keeps what LoRA does and its own output; nothing of the size of a second weight."""
    adapter, x = make_adapter("linear")
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = adapter(x)
    known = {x.data_ptr(), adapter.base.weight.data_ptr(), adapter.lora_down.data_ptr(), adapter.lora_up.data_ptr()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert sum(tensor.numel() == out.numel() for tensor in others) == 1
    assert sum(tensor.numel() for tensor in others) <= out.numel() + out.numel() // 5 * RANK + 5 * 5


def test_layers_of_zeros() -> None:
    """An output whose weights are all zero is left as it is: no number that is not finite comes out of it."""
    base = nn.Linear(7, 5)
    base.weight.data[2] = 0
    adapter = DoRAModule("key", base, RANK, ALPHA)
    x = torch.randn(3, 7, requires_grad=True)
    assert torch.equal(adapter(x), base(x))
    nn.init.normal_(adapter.lora_up)
    grads = torch.autograd.grad(adapter(x).square().sum(), leaves_of(adapter, x))
    assert all(grad.isfinite().all() for grad in grads)


def build(model: nn.Module, **options: object) -> Network:
    """A network in training whose factors and magnitudes are away from where they start."""
    network = C3LierConfig(rank=4, conv_rank=2, dora=True, **options).build(model.targets())
    for adapter in network.adapters:
        generator = torch.Generator().manual_seed(adapter.lora_up.numel())
        nn.init.normal_(adapter.lora_up, generator=generator)
        adapter.dora_scale.data *= 0.5 + torch.rand(adapter.dora_scale.shape, generator=generator)
    return network.train()


def test_what_files_hold(model: nn.Module) -> None:
    """One magnitude for each output, [out, 1] or [out, 1, 1, 1], beside what LoRA files hold."""
    network = build(model)
    tensors = network.adapter_state()
    assert {name.split(".", 1)[1] for name in tensors} == {
        "lora_down.weight", "lora_up.weight", "alpha", "dora_scale",
    }  # fmt: skip
    assert tensors["lora_te_text.dora_scale"].shape == (6, 1)
    assert tensors["lora_unet_blocks_1.dora_scale"].shape == (8, 1, 1, 1)


def test_dropouts_of_numbers_and_ranks(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    """The mask multiplies D·x alone: y = m/‖W + sUD‖·(W·x + s·U·(mask∘D·x)) + b."""
    for kind in ("dropout", "rank_dropout"):
        network = build(model, **{kind: 0.5})
        (adapter,) = [a for a in network.adapters if a.key == "lora_te_text"]
        network.begin_batch(seeds(2))
        x = inputs[1]
        hidden = F.linear(x, adapter.lora_down)
        update = F.linear(hidden * adapter.draw_mask(hidden), adapter.lora_up) * adapter.scale
        gains = adapter.dora_scale.flatten() / adapter._norms()
        expected = gains * (F.linear(x, adapter.base.weight) + update) + adapter.base.bias
        assert torch.allclose(adapter(x), expected, atol=1e-5)
        network.detach()


def test_module_dropout_leaves_the_base_layer(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    """For an image that an adapter is left out for, its output is the base layer's; for others it is as without."""
    network = build(model, module_dropout=0.5)
    network.begin_batch(seeds(2))
    seen = set()
    layer_inputs = (inputs[1], inputs[0], torch.randn(4, 8, 4, 4), torch.randn(2, 8))
    for adapter, x in zip(network.adapters, layer_inputs, strict=True):
        whole = adapter.eval()(x)
        out = adapter.train()(x)
        out.square().sum().backward()
        assert adapter.dora_scale.grad.isfinite().all()
        kept = adapter._draw_kept(len(x)).tolist()
        for row, is_kept in enumerate(kept):
            expected = whole if is_kept else adapter.base(x)
            assert torch.allclose(out[row], expected[row], atol=1e-6)
            seen.add(is_kept)
    assert seen == {True, False}


def test_max_norm(model: nn.Module) -> None:
    """The norm of the low-rank update is what a limit is for; the magnitudes are left alone."""
    network = build(model, scale_weight_norms=0.1)
    before = {adapter.key: adapter.dora_scale.clone() for adapter in network.adapters}
    assert network.on_optimizer_step()["max_norm/keys_scaled"] == 4
    assert network.on_optimizer_step()["max_norm/max_key_norm"].item() == pytest.approx(0.1, rel=1e-4)
    assert all(torch.equal(adapter.dora_scale, before[adapter.key]) for adapter in network.adapters)


class TestContract(NetworkContract):
    """What every network must do, with all of DoRA's company."""

    config: NetworkConfig = C3LierConfig(
        rank=4, alpha=2.0, conv_rank=2, dora=True, dropout=0.1, rank_dropout=0.1, module_dropout=0.1,
        scale_weight_norms=1.0,
    )  # fmt: skip
