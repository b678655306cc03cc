"""LoHa and LoKr: gradients, files by the rules of other tools, ranks of files, and merging."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.networks import C3LierConfig, LierlaConfig, LoHaConfig, LoKrConfig
from lorakit.models.memory.quantization import quantize
from lorakit.models.weights.kronecker_hadamard import update_of
from lorakit.networks.adapter_file import load_initial_weights
from lorakit.networks.dropout import AdapterDropout, DropoutRates
from lorakit.networks.loha import LoHaModule
from lorakit.networks.lokr import LoKrModule, Split, factorization
from lorakit.networks.ranked import RankedModule
from lorakit.networks.ranked_config import RankedConfig
from tests.models.building import CPU

Tensors = Mapping[str, Tensor]

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 32), (2, 6, 24)),
    "linear without bias": (lambda: nn.Linear(24, 32, bias=False), (2, 3, 4, 24)),
    "linear on vectors": (lambda: nn.Linear(24, 32), (4, 24)),
    "1x1 convolution": (lambda: nn.Conv2d(24, 32, 1), (3, 24, 4, 6)),
    "3x3 convolution": (lambda: nn.Conv2d(24, 32, 3, padding=1), (2, 24, 4, 6)),
    "strided 3x3 convolution": (lambda: nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False), (2, 24, 6, 6)),
}


def lokr(rank: int, factor: int, *, both: bool = False, full: bool = False) -> Callable[[nn.Module, float], LoKrModule]:
    """What makes LoKr adapters that split weights in this way."""

    def make(base: nn.Module, alpha: float) -> LoKrModule:
        return LoKrModule(
            "key", base, (rank, alpha, None),
            lambda layer: Split.of(layer, rank, factor, decompose_both=both, full_matrix=full),
        )  # fmt: skip

    return make


SIGNS = torch.tensor([[1.0, -1.0] * 12, [1.0] * 12 + [-1.0] * 12])
"""Inputs that sum to zero."""

KINDS: dict[str, tuple[Callable[[nn.Module, float], RankedModule], set[str]]] = {
    "loha": (
        lambda base, alpha: LoHaModule("key", base, 3, alpha),
        {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    ),
    "lokr": (lokr(2, 2), {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "lokr, both in factors": (lokr(1, -1, both=True), {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}),
    "lokr, whole": (lokr(2, 4, full=True), {"lokr_w1", "lokr_w2"}),
    "lokr, whole by its rank": (lokr(9, 8), {"lokr_w1", "lokr_w2"}),
}


def adapter_of(kind: str, layer: str, alpha: float = 2.0) -> tuple[RankedModule, Tensor]:
    """An adapter far from where it starts, and an input for its layer."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    adapter = KINDS[kind][0](make(), alpha)
    for factor in adapter.factors().values():
        nn.init.normal_(factor, std=0.3)
    return adapter, torch.randn(shape)


def by_the_rules(tensors: Tensors, weight: Tensor) -> Tensor:
    """ΔW as ComfyUI, Forge, A1111 and LyCORIS compute it from a file, in float64.

    LoHa: (w1_a·w1_b) ∘ (w2_a·w2_b)·alpha/rank. LoKr: kron(w1, w2)·alpha/rank, where alpha counts if a matrix has
    factors, whose rank it is; 2-D matrices of convolutions are reshaped.
    """
    own = {name: tensor.double() for name, tensor in tensors.items()}
    if "hada_w1_a" in own:
        update = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        return (update * own["alpha"] / own["hada_w1_b"].shape[0]).reshape(weight.shape)
    rank = None
    matrices = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in own:
            matrices.append(own[name])
        else:
            matrices.append(own[f"{name}_a"] @ own[f"{name}_b"])
            rank = own[f"{name}_b"].shape[0]
    first, second = matrices
    if second.ndim == 4:
        first = first[..., None, None]
    update = torch.kron(first, second).reshape(weight.shape)
    return update if rank is None else update * own["alpha"] / rank


def merged(adapter: RankedModule, x: Tensor, factors: Tensors) -> Tensor:
    """The layer's operation with the weight W + ΔW, in float64."""
    base = adapter.base
    weight = base.weight.double() + by_the_rules({**factors, "alpha": torch.tensor(adapter.alpha)}, base.weight)
    bias = None if base.bias is None else base.bias.double()
    return F.conv2d(x, weight, bias, base.stride, base.padding) if weight.ndim == 4 else F.linear(x, weight, bias)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, layer: str) -> None:
    """Output and all gradients are those of W + ΔW in float64, up to float32."""
    adapter, x = adapter_of(kind, layer)
    assert adapter.factors().keys() == KINDS[kind][1]
    x.requires_grad_()
    out = adapter(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    leaves = [own.detach().double().requires_grad_() for own in (x, *adapter.factors().values())]
    expected = merged(adapter, leaves[0], dict(zip(adapter.factors(), leaves[1:], strict=True)))
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    actual = [out, x.grad, *(own.grad for own in adapter.factors().values())]
    for own, right in zip(actual, (expected, *gradients), strict=True):
        assert own is not None
        assert own.dtype == torch.float32
        assert (own.double() - right).norm() <= 2e-6 * right.norm()


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("layer", ["linear", "linear without bias", "3x3 convolution"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_quantized_layers(kind: str, layer: str, layout: str) -> None:
    """Of a layer in 8 bits, outputs and gradients are those of the same weights in float32, whatever the input is."""
    adapter, x = adapter_of(kind, layer)
    if layout == "sliced":
        x = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    plain = copy.deepcopy(adapter)
    quantize(adapter.base, "int8", CPU)
    plain.base.weight.data = adapter.base.weight
    results = []
    for own in (adapter, plain):
        given = x.detach().requires_grad_()
        out = own(given)
        out.square().sum().backward()
        assert given.grad is not None
        results.append([out, given.grad, *(factor.grad for factor in own.factors().values())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_small_updates(kind: str) -> None:
    """In a bfloat16 model a ΔW far below the rounding of W acts; parameters and gradients are float32."""
    adapter, _ = adapter_of(kind, "linear")
    adapter.factors()[[*adapter.factors()][-1]].data *= 1e-4
    base = adapter.base
    expected = F.linear(SIGNS.double(), by_the_rules(adapter.adapter_state(), base.weight))
    nn.init.ones_(base.weight)
    nn.init.zeros_(base.bias)
    adapter.to(torch.bfloat16)
    out = adapter(SIGNS.to(torch.bfloat16))  # of which W makes exactly nothing
    assert out.dtype == torch.bfloat16
    assert 0 < expected.abs().max() < 1e-2
    assert (out.double() - expected).norm() <= 0.02 * expected.norm()
    out.float().sum().backward()
    assert {own.grad.dtype for own in adapter.factors().values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_large_as_the_update_is_kept(kind: str) -> None:
    """Between the passes the input and the factors are kept, and neither ΔW nor the output of a half."""
    torch.manual_seed(0)
    adapter = KINDS[kind][0](nn.Linear(240, 320), 2.0)
    x = torch.randn(2, 500, 240, requires_grad=True)
    own = {x.data_ptr(), adapter.base.weight.data_ptr(), *(factor.data_ptr() for factor in adapter.factors().values())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(x)
    halves = (adapter.split.first, adapter.split.second) if isinstance(adapter, LoKrModule) else ()
    small = sum(rows * columns for rows, columns in halves)
    assert sum(kept.values()) <= 2 * small


def test_factorization() -> None:
    """Widths are divided as LyCORIS divides them; these are its function's results."""
    expected = {
        (127, -1): (1, 127), (128, -1): (8, 16), (128, 2): (2, 64), (250, 2): (2, 125), (250, 4): (2, 125),
        (250, 8): (5, 50), (250, 16): (10, 25), (360, 4): (4, 90), (360, 8): (8, 45), (360, 16): (15, 24),
        (512, 16): (16, 32), (1024, 8): (8, 128), (1024, 16): (16, 64), (1024, 64): (16, 64), (320, 7): (5, 64),
        (1280, 1): (1, 1280), (12, 5): (3, 4), (1280, -1): (32, 40),
    }  # fmt: skip
    assert {given: factorization(*given) for given in expected} == expected


@pytest.mark.parametrize("layer", ["linear", "1x1 convolution", "3x3 convolution"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_by_the_rules(kind: str, layer: str) -> None:
    """ΔW by the rules of other tools, from what a file holds, is what the adapter does; so is lorakit's own merging."""
    adapter, x = adapter_of(kind, layer)
    adapter.file_alpha = adapter.file_alpha if "whole" in kind else 5.0
    tensors = adapter.export_state()
    assert tensors["alpha"] == adapter.file_alpha
    update = by_the_rules(tensors, adapter.base.weight)
    with torch.no_grad():
        change = adapter(x).double() - adapter.base(x).double()
    base = adapter.base
    is_linear = isinstance(base, nn.Linear)
    alone = F.linear(x.double(), update) if is_linear else F.conv2d(x.double(), update, None, base.stride, base.padding)
    assert (change - alone).norm() <= 1e-5 * alone.norm()
    doubles = {name: tensor.double() for name, tensor in tensors.items() if name != "alpha"}
    assert torch.allclose(update_of(doubles, tensors["alpha"].double()).reshape(update.shape), update, rtol=1e-12)


def test_cores_of_convolutions_merge() -> None:
    """Tucker decompositions, which LyCORIS saves on request, are merged as it and ComfyUI compute them."""
    torch.manual_seed(0)
    t, a, b = torch.randn(3, 3, 3, 3), torch.randn(3, 8), torch.randn(3, 6)
    built = torch.einsum("ijkl,jr,ip->prkl", t, b, a).contiguous()
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_t1": t, "hada_w2_a": a, "hada_w2_b": b, "hada_t2": t}
    assert torch.allclose(update_of(loha, 1.5), built * built * 0.5)
    first = torch.randn(4, 2)
    update = update_of({"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}, 1.5)
    assert torch.allclose(update, torch.kron(first[..., None, None], built) * 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_module_dropout(kind: str) -> None:
    """An adapter that is left out for an image leaves the base layer's output and no gradient from it."""
    adapter, x = adapter_of(kind, "3x3 convolution")
    dropout = AdapterDropout(0.0)
    adapter.use_dropout(dropout, DropoutRates(module=0.5))
    empty = torch.zeros(2, dtype=torch.int64)
    dropout.begin_batch(empty, empty[0], None, torch.tensor([True, False]))
    whole = adapter.eval()(x)
    x.requires_grad_()
    out = adapter.train()(x)
    assert torch.allclose(out[0], whole[0], atol=1e-5)
    assert torch.allclose(out[1], adapter.base(x)[1], atol=1e-6)
    out.square().sum().backward()
    gradients = [own.grad.clone() for own in (x, *adapter.factors().values())]
    x.grad = None
    adapter.zero_grad()
    adapter.eval()
    (adapter(x)[:1].square().sum() + adapter.base(x)[1:].square().sum()).backward()
    for own, right in zip(gradients, [x.grad, *(factor.grad for factor in adapter.factors().values())], strict=True):
        assert torch.allclose(own, right, rtol=1e-4, atol=1e-3)


def test_alpha_of_files(tmp_path: Path) -> None:
    """Another alpha is made up for; one that is missing is the rank, and without factors it counts for nothing."""
    for kind in KINDS:
        adapter, _ = adapter_of(kind, "linear")
        tensors = {name: tensor.detach().clone() for name, tensor in adapter.adapter_state().items()}
        for alpha in (0.5, None):
            given = {f"lora_unet_x.{name}": tensor for name, tensor in tensors.items() if name != "alpha"}
            given |= {} if alpha is None else {"lora_unet_x.alpha": torch.tensor(alpha)}
            save_file(given, tmp_path / "given.safetensors")
            loaded = load_initial_weights(tmp_path / "given.safetensors")
            adapter.load_adapter_state({name.partition(".")[2]: tensor for name, tensor in loaded.items()})
            meant, weight = torch.tensor(adapter.rank if alpha is None else alpha), adapter.base.weight
            expected = by_the_rules({**tensors, "alpha": meant}, weight)
            found = by_the_rules(adapter.adapter_state(), weight)
            assert torch.allclose(found, expected, rtol=1e-5)


CONFIGS: dict[str, RankedConfig] = {
    "loha": LoHaConfig(rank=3, alpha=2.0, conv_rank=2, conv_alpha=0.5),
    "lokr": LoKrConfig(rank=2, alpha=1.5, factor=4),
    "lokr, both": LoKrConfig(rank=1, alpha=1.0, decompose_both=True, conv_rank=1),
    "lokr, whole": LoKrConfig(rank=1, full_matrix=True, factor=8, rank_stabilized=True),
}


def built(config: RankedConfig, folder: Path, seed: int | None = 0) -> tuple[Any, Any]:
    """A model and its network, far from where it starts."""
    model = SD1Config(path=str(folder)).build(CPU, torch.float32)
    network = config.build(model.targets(("text_encoder", "unet")))
    generator = torch.Generator().manual_seed(seed or 0)
    for adapter in network.adapters if seed is not None else ():
        for factor in adapter.factors().values():
            factor.data += 0.1 * torch.randn(factor.shape, generator=generator)
    return model, network


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_is_continued_and_merged(kind: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """Sizes and weights come from a file with `rank_from_weights`; merged into a model, it has the same effect."""
    _, network = built(CONFIGS[kind], tiny_sd1)
    file = tmp_path / "lora.safetensors"
    exported = network.export_state()
    save_file(exported, file)
    again = type(CONFIGS[kind])(weights=file, rank_from_weights=True)
    _, other = built(again, tiny_sd1, seed=None)
    other.load_adapter_state(load_initial_weights(file))
    found = other.export_state()
    assert found.keys() == exported.keys()
    expected = {adapter.key: by_the_rules(adapter.adapter_state(), adapter.base.weight) for adapter in network.adapters}
    for adapter in other.adapters:
        update = by_the_rules(adapter.adapter_state(), adapter.base.weight)
        assert torch.allclose(update, expected[adapter.key], rtol=1e-5, atol=1e-9)
    plain = {adapter.key: adapter.base.weight for adapter in network.adapters}
    config = SD1Config(path=str(tiny_sd1), base_weights=(file,), base_weights_multipliers=(0.5,))
    assert list(config.problems()) == []
    for target in config.build(CPU, torch.float32).targets(("text_encoder", "unet")):
        if target.key in expected:
            exact = plain[target.key].double() + 0.5 * expected[target.key]
            assert torch.allclose(target.module.weight.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_layers(config: type[Any], tiny_sd1: Path) -> None:
    """The layers are those of LoRA-LierLa, with `conv_rank` those of LoRA-C3Lier."""
    for own, other in ((config(), LierlaConfig()), (config(conv_rank=2), C3LierConfig())):
        keys = [{adapter.key for adapter in built(one, tiny_sd1, None)[1].adapters} for one in (own, other)]
        assert keys[0] == keys[1]


def test_metadata() -> None:
    """Files say what LyCORIS' files say of their network, by which tools know them."""
    loha = LoHaConfig(rank=8, alpha=4.0, conv_rank=4).metadata()
    assert (loha["ss_network_module"], loha["ss_network_dim"], loha["ss_network_alpha"]) == ("lycoris.kohya", 8, 4.0)
    assert json.loads(str(loha["ss_network_args"])) == {"algo": "loha", "conv_dim": "4"}
    lokr = json.loads(
        str(LoKrConfig(factor=8, decompose_both=True, rank_stabilized=True).metadata()["ss_network_args"])
    )
    assert lokr == {"algo": "lokr", "factor": "8", "decompose_both": "True", "rs_lora": "True"}


def test_options_without_effect() -> None:
    """Options of convolutions are warned of where none are adapted."""
    warned = [problem.key for problem in LoHaConfig(conv_alpha=2.0, conv_block_ranks=(1,) * 25).warnings()]
    assert warned == ["conv_alpha", "conv_block_ranks"]
    assert not list(LoKrConfig(rank=4, conv_rank=4, conv_alpha=2.0).warnings())
