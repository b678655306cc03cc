"""What every network must do."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from attrs import frozen
from torch import Tensor
from torch.optim import AdamW

from lorakit.api.components import NetworkConfig
from lorakit.data.loader import Batch
from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget, DiffusionModel
from lorakit.networks.network import Network, torch_groups
from lorakit.testing.contracts.component import ComponentContract
from lorakit.testing.contracts.tiny_batch import loss_of, make_batch, predict, read_model

PARTS = ("unet", "text_encoder")
"""The parts of the tiny Stable Diffusion 1.x that networks are attached to."""


@frozen
class Adapted:
    """A tiny model with a network attached."""

    model: DiffusionModel
    targets: list[AdaptationTarget]
    network: Network
    batch: Batch
    base_prediction: Tensor
    """The model's prediction for the batch before the network was attached."""

    def predict(self) -> Tensor:
        """The model's prediction for the batch now, without gradients."""
        self.network.begin_batch(self.batch.sample_seeds)
        with torch.no_grad():
            return predict(self.model, self.batch)

    def loss(self) -> Tensor:
        """The training loss of the batch now."""
        self.network.begin_batch(self.batch.sample_seeds)
        return loss_of(self.model, self.batch)

    def disturb(self) -> None:
        """Move all trained parameters a little, as training does."""
        generator = torch.Generator().manual_seed(5)
        for part in self.network.parts:
            for parameter in self.network.parameters_of(part):
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


class NetworkContract(ComponentContract):
    """What every network must do.

        class TestLoHa(NetworkContract):
            config = LoHaConfig(rank=4, alpha=2.0)

    It is attached to a tiny Stable Diffusion 1.x.
    """

    config: NetworkConfig
    lr = 1e-2
    """The learning rate with which AdamW should lower the loss of a single batch in 15 steps."""

    @pytest.fixture
    def adapted(self, tiny_sd1: Path) -> Adapted:
        """A tiny model with the network attached, in evaluation mode."""
        return self.attached(tiny_sd1)

    def test_starts_without_effect(self, adapted: Adapted) -> None:
        """With a fresh network the model predicts what it did without, bit for bit."""
        assert torch.equal(adapted.predict(), adapted.base_prediction)

    def test_trains_the_adapters_alone(self, adapted: Adapted) -> None:
        """Every trained parameter gets a gradient, and no parameter of the base model does."""
        adapted.network.train()
        adapted.loss().backward()  # type: ignore[no-untyped-call]
        trained = [own for part in adapted.network.parts for own in adapted.network.parameters_of(part)]
        assert trained
        assert all(own.grad is not None and own.grad.isfinite().all() for own in trained)
        assert any(own.grad is not None and own.grad.any() for own in trained)
        names = {id(own) for own in trained}
        encoder = [own for target in adapted.targets for own in target.parent.parameters()]
        base = [own for own in [*adapted.model.denoiser.parameters(), *encoder] if id(own) not in names]
        assert not any(own.requires_grad or own.grad is not None for own in base)

    def test_lowers_the_loss(self, adapted: Adapted) -> None:
        """Fifteen steps on one batch lower its loss clearly."""
        optimizer = AdamW(torch_groups(adapted.network.parameter_groups(lambda _: self.lr)), weight_decay=0)
        first = adapted.loss().item()
        adapted.network.train()
        for _ in range(15):
            optimizer.zero_grad()
            adapted.loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        adapted.network.eval()
        assert adapted.loss().item() < 0.97 * first

    def test_keys_are_those_of_the_layers(self, adapted: Adapted) -> None:
        """A LoRA file's keys are `<key of the layer>.<suffix>`, its tensors float32 and copies on the CPU."""
        tensors = adapted.network.adapter_state()
        layers = {target.key for target in adapted.targets}
        assert {key.partition(".")[0] for key in tensors} <= layers
        assert all(key.partition(".")[2] for key in tensors)
        before = {key: tensor.clone() for key, tensor in tensors.items()}
        adapted.disturb()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in before.items())
        assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors.values())

    def test_reads_what_it_wrote(self, adapted: Adapted, tiny_sd1: Path) -> None:
        """Another network that takes over the tensors has the same ones and predicts the same, bit for bit."""
        adapted.disturb()
        tensors = adapted.network.adapter_state()
        other = self.attached(tiny_sd1, seed=1)
        other.network.load_adapter_state(tensors)
        again = other.network.adapter_state()
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
        assert torch.equal(other.predict(), adapted.predict())
        assert not torch.equal(adapted.predict(), adapted.base_prediction)

    def test_files_mean_the_same(self, adapted: Adapted, tiny_sd1: Path) -> None:
        """Another network that takes over what a LoRA file holds predicts the same."""
        adapted.disturb()
        tensors = adapted.network.export_state()
        other = self.attached(tiny_sd1, seed=1)
        other.network.load_adapter_state(tensors)
        assert torch.allclose(other.predict(), adapted.predict(), rtol=1e-4, atol=1e-5)

    def test_refuses_what_does_not_fit(self, adapted: Adapted) -> None:
        """Tensors of which one is missing, or has another shape, are refused, and nothing is changed."""
        adapted.disturb()
        before = adapted.network.adapter_state()
        key = next(key for key, tensor in before.items() if tensor.dim())
        missing = {other: tensor + 1 for other, tensor in before.items() if other != key}
        misshapen = {**missing, key: torch.zeros(*before[key].shape, 2)}
        for wrong in (missing, misshapen):
            with pytest.raises(AdapterError):
                adapted.network.load_adapter_state(wrong)
        after = adapted.network.adapter_state()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

    def test_multiplier_zero_is_the_base_model(self, adapted: Adapted) -> None:
        """With the multiplier 0 a trained network has no effect, bit for bit; with 1 it has its own again."""
        adapted.disturb()
        trained = adapted.predict()
        adapted.network.multiplier = 0.0
        assert torch.equal(adapted.predict(), adapted.base_prediction)
        adapted.network.multiplier = 1.0
        assert torch.equal(adapted.predict(), trained)

    def test_detaches(self, adapted: Adapted) -> None:
        """Detached, the model is as it was before; attached again, as it was trained."""
        adapted.disturb()
        trained = adapted.predict()
        adapted.network.detach()
        assert torch.equal(adapted.predict(), adapted.base_prediction)
        adapted.network.attach()
        assert torch.equal(adapted.predict(), trained)

    def test_adapts_the_parts_it_is_told(self, tiny_sd1: Path) -> None:
        """With a single part, only layers of that part get adapters, whatever targets there are."""
        for part in PARTS if self.config.parts is None else self.config.parts:
            alone = self.attached(tiny_sd1, config=attrs.evolve(self.config, parts=(part,)))
            parts = {target.key: target.part for target in alone.targets}
            assert alone.network.parts == (part,)
            assert {parts[key.partition(".")[0]] for key in alone.network.adapter_state()} == {part}

    def test_initialisation_follows_the_seed(self, adapted: Adapted, tiny_sd1: Path) -> None:
        """The weights at the start depend on seed and layer alone: not on other draws, and not on other layers."""
        torch.manual_seed(99)
        alone = self.attached(tiny_sd1, config=attrs.evolve(self.config, parts=PARTS[:1]))
        expected = adapted.network.adapter_state()
        assert all(torch.equal(expected[key], tensor) for key, tensor in alone.network.adapter_state().items())
        adapted.disturb()
        adapted.network.initialize(0)
        again = adapted.network.adapter_state()
        assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())

    def test_randomness_follows_the_samples(self, adapted: Adapted) -> None:
        """While training, dropout and the like depend on the samples' seeds and on nothing else."""
        adapted.disturb()
        adapted.network.train()
        torch.manual_seed(1)
        first = adapted.predict()
        torch.manual_seed(2)
        assert torch.equal(adapted.predict(), first)

    def test_parameters_stay_float32(self, tiny_sd1: Path) -> None:
        """In a bfloat16 model the trained parameters are float32, and predictions bfloat16."""
        half = self.attached(tiny_sd1, dtype=torch.bfloat16)
        half.network.to(torch.bfloat16)
        trained = [own for part in half.network.parts for own in half.network.parameters_of(part)]
        assert {own.dtype for own in trained} == {torch.float32}
        assert half.predict().dtype == torch.bfloat16

    def attached(
        self,
        path: Path,
        config: NetworkConfig | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Adapted:
        """A fresh tiny model with the network attached, in evaluation mode."""
        model = read_model(path, dtype)
        batch = make_batch(model)
        with torch.no_grad():
            base_prediction = predict(model, batch)
        targets = model.targets(PARTS)
        network = (config or self.config).build(targets)
        network.initialize(seed)
        return Adapted(model, targets, network.eval(), batch, base_prediction)
