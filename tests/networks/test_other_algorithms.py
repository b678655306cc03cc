"""What a plugin with another algorithm than LoRA has to write: nothing but its adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.networks.network import AdapterModule, Network
from lorakit.utils.rng import derived_seed


class HadamardModule(AdapterModule):
    """LoHa for linear layers: W + (A₁·B₁) ∘ (A₂·B₂) (Hyeon-Woo et al., 2021, arXiv:2108.06098)."""

    def __init__(self, key: str, base: nn.Linear, rank: int) -> None:
        super().__init__(key, base)
        outs, ins = base.weight.shape
        self.factors = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(outs, rank) if name.endswith("a") else torch.zeros(rank, ins))
                for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            }
        )
        self.initialize(0)

    def initialize(self, seed: int) -> None:
        """One factor zero, the others small."""
        generator = torch.Generator().manual_seed(derived_seed(seed, self.key))
        for name, factor in self.factors.items():
            nn.init.normal_(factor, std=0.0 if name == "hada_w2_a" else 0.1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus update."""
        if self.multiplier == 0:
            return self.base(x)
        f = self.factors
        update = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
        return self.base(x) + self.multiplier * F.linear(x, update)

    def adapter_state(self) -> dict[str, Tensor]:
        """The four factors."""
        return dict(self.factors.items())


def make(target: AdaptationTarget) -> HadamardModule | None:
    """An adapter for linear layers only."""
    return HadamardModule(target.key, target.module, 2) if isinstance(target.module, nn.Linear) else None


def test_trains_saves_and_loads(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    """A network of another algorithm starts without effect, trains, and comes back from its tensors."""
    before = model(*inputs).detach()
    network = Network(model.targets(), make).attach()
    network.initialize(3)
    assert torch.equal(model(*inputs), before)
    parameters = [p for group in network.parameter_groups(lambda _: 0.1) for p in group.parameters]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()
    trained = model(*inputs).detach()
    assert trained.square().mean() < before.square().mean()
    tensors = network.adapter_state()
    network.initialize(3)
    network.load_adapter_state(tensors)
    assert torch.equal(model(*inputs), trained)
    network.multiplier = 0
    assert torch.equal(model(*inputs), before)


def test_masters_stay_float32(model: nn.Module) -> None:
    """Parameters that an adapter keeps in a submodule stay float32 too when the model is put in half precision."""
    network = Network(model.targets(), make).attach()
    model.to(torch.bfloat16)
    assert {p.dtype for part in network.parts for p in network.parameters_of(part)} == {torch.float32}
    assert model.out.base.weight.dtype == torch.bfloat16


def test_shapes_are_checked_for_it(model: nn.Module) -> None:
    """A file of another rank is refused by the shapes, without the adapter's doing."""
    network = Network(model.targets(), make)
    tensors = network.adapter_state() | {"lora_unet_out.hada_w1_b": torch.zeros(5, 8)}
    with pytest.raises(AdapterError, match=r"hada_w1_b is \[5, 8\] in the file, \[2, 8\] in the network"):
        network.load_adapter_state(tensors)
