from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.builtin.networks import C3LierConfig
from lorakit.networks.dropout import DropoutRates, NetworkDropout, _mix
from lorakit.networks.network import Network
from lorakit.utils.rng import derived_seed

Inputs = tuple[Tensor, Tensor]
KINDS = ["dropout", "rank_dropout", "module_dropout"]


def seeds(count: int, first: int = 0) -> Tensor:
    """Seeds as the engine draws them."""
    return torch.tensor([derived_seed(42, "dropout", 1, first + index) for index in range(count)])


def build(model: nn.Module, **rates: float) -> Network:
    """A network in training whose factors are away from zero."""
    network = C3LierConfig(rank=4, conv_rank=2, **rates).build(model.targets())
    for part in network.parts:
        for parameter in network.parameters_of(part):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return network.train()


def test_the_mix_is_splitmix64() -> None:
    """The integers are those of SplitMix64 as published, computed here with Python's unbounded integers."""

    def published(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    inputs = [0, 1, 2**63 - 1, -1, -(2**63), 123456789, -987654321]
    expected = [published(z % 2**64) for z in inputs]
    assert [z % 2**64 for z in _mix(torch.tensor(inputs)).tolist()] == expected


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_neuron_rate(rate: float) -> None:
    """The share `dropout` of the activations is zero, independently; the others are scaled so that the mean is kept."""
    dropouts = NetworkDropout(DropoutRates(neuron=rate), ["a", "b"], 16)
    dropouts.begin_batch(seeds(8))
    mask = dropouts.adapters[1].mask(torch.empty(8, 500, 16))
    assert mask.shape == (8, 500, 16)
    kept = mask > 0
    deviation = (rate * (1 - rate)) ** 0.5
    assert float(kept.double().mean()) == pytest.approx(1 - rate, abs=5 * deviation / kept.numel() ** 0.5)
    assert torch.equal(mask[kept], torch.full_like(mask[kept], 1 / (1 - rate)))
    for axis, count in enumerate(mask.shape):
        means = kept.double().mean(dim=[other for other in range(3) if other != axis])
        assert float((means - (1 - rate)).abs().max()) < 6 * deviation * (count / kept.numel()) ** 0.5
    neighbours = kept[:, 1:] & kept[:, :-1]
    assert float(neighbours.double().mean()) == pytest.approx((1 - rate) ** 2, abs=0.02)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rank_and_module_rates(rate: float) -> None:
    """Ranks are dropped for a whole image and scaled; adapters are left out for a whole image and not scaled."""
    keys = [f"adapter {index}" for index in range(200)]
    tolerance = 5 * (rate * (1 - rate)) ** 0.5
    hidden = torch.empty(32, 3, 16)

    ranks = NetworkDropout(DropoutRates(rank=rate), keys, 16)
    ranks.begin_batch(seeds(32))
    mask = torch.stack([ranks.adapters[index].mask(hidden) for index in range(len(keys))])
    assert mask.shape == (200, 32, 1, 16)
    assert float((mask > 0).double().mean()) == pytest.approx(1 - rate, abs=tolerance / mask.numel() ** 0.5)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])

    modules = NetworkDropout(DropoutRates(module=rate), keys, 16)
    modules.begin_batch(seeds(32))
    mask = torch.stack([modules.adapters[index].mask(hidden) for index in range(len(keys))])
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask, mask[..., :1].expand_as(mask))
    assert float(mask.mean()) == pytest.approx(1 - rate, abs=tolerance / (200 * 32) ** 0.5)


def test_kinds_multiply() -> None:
    """With all kinds at once an activation survives only if its module, its rank and itself do."""
    rates = {"neuron": 0.3, "rank": 0.4, "module": 0.2}
    masks = {}
    for names in (["neuron"], ["rank"], ["module"], list(rates)):
        dropouts = NetworkDropout(DropoutRates(**{name: rates[name] for name in names}), ["a"], 8)
        dropouts.begin_batch(seeds(6))
        masks[" ".join(names)] = dropouts.adapters[0].mask(torch.empty(6, 5, 8))
    assert torch.allclose(masks["neuron rank module"], masks["neuron"] * masks["rank"] * masks["module"])


def test_text_chunks_share_their_images_seed() -> None:
    """Of n rows per image, all have the image's ranks and module, and neurons of their own."""
    dropouts = NetworkDropout(DropoutRates(neuron=0.5, rank=0.5), ["a"], 8)
    dropouts.begin_batch(seeds(2))
    mask = dropouts.adapters[0].mask(torch.empty(6, 50, 8)) > 0
    ranks = mask.any(dim=1)
    assert torch.equal(ranks[0], ranks[1])
    assert torch.equal(ranks[3], ranks[5])
    assert not torch.equal(ranks[0], ranks[3])
    assert not torch.equal(mask[0], mask[1])
    with pytest.raises(ValueError, match="5 rows"):
        dropouts.adapters[0].mask(torch.empty(5, 50, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_split_over_processes(model: nn.Module, inputs: Inputs, kind: str) -> None:
    """Each image's output is the same whether its batch is computed whole or in parts."""
    network = build(model, **{kind: 0.5})
    network.begin_batch(seeds(2))
    whole = model(*inputs)
    for index in range(2):
        network.begin_batch(seeds(1, index))
        alone = model(*(part[index : index + 1] for part in inputs))
        assert torch.allclose(alone, whole[index : index + 1], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_and_determinism(model: nn.Module, inputs: Inputs, kind: str) -> None:
    """The same seeds give the same output, other seeds another, and in eval mode nothing is dropped."""
    network = build(model, **{kind: 0.5})

    def output(first: int) -> Tensor:
        torch.rand(first + 1)
        network.begin_batch(seeds(2, first))
        return model(*inputs)

    assert torch.equal(output(0), output(0))
    assert not torch.equal(output(0), output(2))
    dropped = output(0)
    network.eval()
    kept = output(0)
    assert torch.equal(kept, output(2))
    assert not torch.equal(kept, dropped)
    network.detach()
    plain = C3LierConfig(rank=4, conv_rank=2).build(model.targets())
    plain.load_adapter_state(network.adapter_state())
    assert torch.equal(model(*inputs), kept)


def test_gradient_checkpointing(model: nn.Module, inputs: Inputs) -> None:
    """Recomputing in the backward pass meets the same masks: the gradients are equal, bit for bit."""
    network = build(model, dropout=0.3, rank_dropout=0.3, module_dropout=0.3)
    network.begin_batch(seeds(2))
    trained = [p for part in network.parts for p in network.parameters_of(part)]
    plain = torch.autograd.grad(model(*inputs).square().sum(), trained)
    recomputed = torch.autograd.grad(checkpoint(model, *inputs, use_reentrant=False).square().sum(), trained)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)
    assert any(bool(gradient.any()) for gradient in plain)


def test_expected_output_is_the_output_without_dropout(model: nn.Module, inputs: Inputs) -> None:
    """Averaged over many seeds, neuron and rank dropout leave a linear adapter's update as it is."""
    texts = inputs[1][:1].expand(4000, -1, -1)
    network = build(model, dropout=0.2, rank_dropout=0.2)
    network.begin_batch(seeds(4000))
    dropped = model.text(texts)
    base = model.text.base(inputs[1][:1])
    network.eval()
    update = model.text(inputs[1][:1]) - base
    assert torch.allclose((dropped - base).mean(0), update[0], atol=0.05 * update.abs().max().item())


def test_forgotten_seeds(model: nn.Module, inputs: Inputs) -> None:
    """Training with dropout before the first seeds are known is refused instead of done without dropout."""
    build(model, dropout=0.5)
    with pytest.raises(RuntimeError, match="begin_batch"):
        model(*inputs)


@pytest.mark.parametrize("field", KINDS)
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_out_of_range(field: str, rate: float) -> None:
    """Rates are at least 0 and below 1."""
    with pytest.raises(ValueError, match=field):
        C3LierConfig(**{field: rate})
