from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit.builtin.networks import C3LierConfig
from lorakit.networks.max_norm import update_norms
from lorakit.networks.network import Network

LIMIT = 1.0


def build(model: nn.Module, **options: object) -> Network:
    """A network with a limit and factors of very different sizes: some of its updates are far beyond the limit."""
    network = C3LierConfig(rank=4, alpha=3.0, conv_rank=2, scale_weight_norms=LIMIT, **options).build(model.targets())
    for index, adapter in enumerate(network.adapters):
        generator = torch.Generator().manual_seed(index)
        for factor in (adapter.lora_up, adapter.lora_down):
            nn.init.normal_(factor, std=10.0 ** (index - 2), generator=generator)
    return network


def updates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """(alpha/rank)·U·D of each layer as a full matrix, in float64."""
    full = {}
    for key in {name.split(".")[0] for name in tensors}:
        down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
        full[key] = up.flatten(1) @ down.flatten(1) * (tensors[f"{key}.alpha"].double() / len(down))
    return full


def test_norms_without_the_product() -> None:
    """The norms from the small Gram matrices are those of the full products in float64, for ranks of all kinds."""
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 8, 64):
        up, down = torch.randn(5, 40, rank, generator=generator), torch.randn(5, rank, 90, generator=generator)
        expected = (up.double() @ down.double()).norm(dim=(1, 2))
        assert torch.allclose(update_norms(up, down).double(), expected, rtol=1e-5)
    assert torch.equal(update_norms(torch.zeros(1, 3, 2), down[:1, :2]), torch.zeros(1))


def test_equals_the_formula(model: nn.Module) -> None:
    """Each update becomes min(n, M)/n times what it was, with n by the full matrix; those below M stay, bit for bit."""
    network = build(model)
    before = network.adapter_state()
    numbers = network.on_optimizer_step()
    after = network.adapter_state()
    norms = []
    for key, update in updates(before).items():
        norm = update.norm()
        ratio = norm.clamp(max=LIMIT) / norm
        norms.append(norm * ratio)
        assert torch.allclose(updates(after)[key], update * ratio, rtol=1e-5, atol=1e-7)
        for suffix in ("lora_down.weight", "lora_up.weight"):
            name = f"{key}.{suffix}"
            assert torch.allclose(after[name].double(), before[name].double() * ratio.sqrt(), rtol=1e-5)
            assert norm >= LIMIT or torch.equal(after[name], before[name])
    assert numbers["max_norm/keys_scaled"] == sum(norm > LIMIT - 1e-4 for norm in norms) == 2
    assert numbers["max_norm/max_key_norm"].item() == pytest.approx(max(norms).item(), rel=1e-5)
    assert numbers["norm/avg_key_norm"].item() == pytest.approx((sum(norms) / len(norms)).item(), rel=1e-5)


def test_without_effect_below_the_limit(model: nn.Module) -> None:
    """A fresh network, all of whose updates are zero, stays as it is, and its norms are zero."""
    network = C3LierConfig(rank=4, scale_weight_norms=LIMIT).build(model.targets())
    before = network.adapter_state()
    assert {name: value.item() for name, value in network.on_optimizer_step().items()} == {
        "max_norm/keys_scaled": 0,
        "max_norm/max_key_norm": 0,
        "norm/avg_key_norm": 0,
    }
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.adapter_state().items())


def test_no_limit(model: nn.Module) -> None:
    """Without the option nothing is measured and nothing scaled."""
    assert C3LierConfig(rank=4).build(model.targets()).on_optimizer_step() == {}


def test_runs_on_the_device(model: nn.Module) -> None:
    """No number is read back: the whole computation runs on tensors that have shapes but no values."""
    network = build(model.to("meta"))
    assert all(value.device.type == "meta" for value in network.on_optimizer_step().values())
