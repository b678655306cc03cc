from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from lorakit.builtin.networks import C3LierConfig, LierlaConfig
from lorakit.errors import AdapterError
from lorakit.networks.network import Network

Inputs = tuple[Tensor, Tensor]
CONFIG = C3LierConfig(rank=3, alpha=2.0, conv_rank=2, conv_alpha=0.5)


@torch.no_grad()
def randomize(network: Network) -> None:
    """Set all factors away from zero."""
    for part in network.parts:
        for parameter in network.parameters_of(part):
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))


def test_equals_merging_by_the_file(model: nn.Module, inputs: Inputs) -> None:
    """The model with adapters computes what it does with W + (alpha/rank)·U·D merged in from the file's tensors."""
    network = CONFIG.build(model.targets())
    randomize(network)
    adapted = model(*inputs)
    tensors = network.adapter_state()
    network.detach()
    for target in model.targets():
        down, up = tensors[f"{target.key}.lora_down.weight"], tensors[f"{target.key}.lora_up.weight"]
        scale = tensors[f"{target.key}.alpha"].item() / len(down)
        target.module.weight.data += scale * (up.flatten(1) @ down.flatten(1)).view(target.module.weight.shape)
    assert torch.allclose(model(*inputs), adapted, atol=1e-5)


def test_detach_restores(model: nn.Module, inputs: Inputs) -> None:
    """After detach the model has its own layers again and the same output, bit for bit; attach brings them back."""
    before = model(*inputs)
    layers = [target.module for target in model.targets()]
    network = CONFIG.build(model.targets())
    randomize(network)
    adapted = model(*inputs)
    assert not torch.equal(adapted, before)
    network.detach()
    assert [target.module for target in model.targets()] == layers
    assert torch.equal(model(*inputs), before)
    network.attach()
    assert torch.equal(model(*inputs), adapted)


def test_multiplier(model: nn.Module, inputs: Inputs) -> None:
    """0 gives the base model bit for bit, 1 the trained one, and the update grows in proportion between them."""
    before = model(*inputs)
    network = LierlaConfig(rank=2, parts=("text_encoder",)).build(model.targets())
    randomize(network)
    full = model(*inputs) - before
    network.multiplier = 0.5
    assert torch.allclose(model(*inputs) - before, 0.5 * full, atol=1e-6)
    network.multiplier = 0
    assert network.multiplier == 0
    assert torch.equal(model(*inputs), before)


def test_which_layers(model: nn.Module) -> None:
    """LierLa leaves the resnet's convolution out, C3Lier adapts it with its own rank, and `parts` is kept to."""
    lierla = LierlaConfig(rank=2).build(model.targets())
    assert lierla.parts == ("text_encoder", "unet")
    assert {key.split(".")[0] for key in lierla.adapter_state()} == {
        "lora_te_text",
        "lora_unet_blocks_0",
        "lora_unet_out",
    }
    lierla.detach()
    c3lier = C3LierConfig(rank=2, conv_rank=5, conv_alpha=3.0, parts=("unet",)).build(model.targets())
    assert c3lier.parts == ("unet",)
    tensors = c3lier.adapter_state()
    assert tensors["lora_unet_blocks_1.lora_down.weight"].shape == (5, 8, 3, 3)
    assert tensors["lora_unet_blocks_1.lora_up.weight"].shape == (8, 5, 1, 1)
    assert tensors["lora_unet_blocks_1.alpha"] == 3.0
    assert tensors["lora_unet_blocks_0.lora_down.weight"].shape == (2, 3, 1, 1)
    assert not any(key.startswith("lora_te") for key in tensors)


def test_nothing_to_adapt(model: nn.Module) -> None:
    """A network without a single layer to adapt is an error that names the keys to look at."""
    with pytest.raises(AdapterError, match=r"network\.name, network\.parts and network\.layers"):
        LierlaConfig(parts=("vae",)).build(model.targets())


def test_parameters_and_groups(model: nn.Module) -> None:
    """Only the factors are trained; each part's make up a group with its name and learning rate."""
    network = CONFIG.build(model.targets())
    trained = [p for part in network.parts for p in network.parameters_of(part)]
    assert {id(p) for p in trained} == {id(p) for p in network.parameters() if p.requires_grad}
    assert len(trained) == 8
    rates = {"unet": 1e-4, "text_encoder": 5e-5}
    groups = network.parameter_groups(lambda target: rates[target.part])
    assert [(group.name, group.lr, len(group.parameters)) for group in groups] == [
        ("text_encoder", 5e-5, 2),
        ("unet", 1e-4, 6),
    ]


def test_tensors_are_copies(model: nn.Module) -> None:
    """What goes into a file is float32, contiguous and on the CPU, and shares no memory with what is trained."""
    network = CONFIG.build(model.targets())
    tensors = network.adapter_state()
    assert {(t.dtype, t.device.type, t.is_contiguous()) for t in tensors.values()} == {(torch.float32, "cpu", True)}
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors) == 12
    assert tensors["lora_te_text.alpha"].shape == ()
    before = tensors["lora_te_text.lora_down.weight"].clone()
    randomize(network)
    assert torch.equal(tensors["lora_te_text.lora_down.weight"], before)


def test_load_restores_and_rounds_nothing(model: nn.Module) -> None:
    """Loading what was saved brings it back bit for bit."""
    network = CONFIG.build(model.targets())
    randomize(network)
    saved = network.adapter_state()
    network.initialize(7)
    assert not torch.equal(network.adapter_state()["lora_te_text.lora_up.weight"], saved["lora_te_text.lora_up.weight"])
    network.load_adapter_state(saved)
    for key, tensor in network.adapter_state().items():
        assert torch.equal(tensor, saved[key])


def test_alpha_of_a_half_precision_file_fits(model: nn.Module) -> None:
    """An alpha that a bfloat16 file could not hold exactly is still this alpha."""
    network = LierlaConfig(rank=2, alpha=0.7).build(model.targets())
    network.load_adapter_state({key: tensor.bfloat16() for key, tensor in network.adapter_state().items()})
    assert network.adapter_state()["lora_te_text.alpha"] == pytest.approx(0.7)


def test_files_hold_the_alphas_of_the_config(model: nn.Module) -> None:
    """With the scale alpha/√rank a file has the config's alphas, conv_alpha too, and √rank is in the up factors."""
    config = C3LierConfig(rank=3, alpha=0.7, conv_rank=2, conv_alpha=0.5, rank_stabilized=True)
    network = config.build(model.targets())
    randomize(network)
    exact, written = network.adapter_state(), network.export_state()
    for key, rank, alpha in (("lora_te_text", 3, 0.7), ("lora_unet_blocks_1", 2, 0.5)):
        assert exact[f"{key}.alpha"].item() == pytest.approx(alpha * rank**0.5)
        assert written[f"{key}.alpha"].item() == pytest.approx(alpha)
        assert torch.equal(written[f"{key}.lora_down.weight"], exact[f"{key}.lora_down.weight"])
        torch.testing.assert_close(written[f"{key}.lora_up.weight"], exact[f"{key}.lora_up.weight"] * rank**0.5)
    network.load_adapter_state(
        {key: tensor.bfloat16() if tensor.ndim == 0 else tensor for key, tensor in written.items()}
    )
    for key, tensor in network.adapter_state().items():
        torch.testing.assert_close(tensor, exact[key], rtol=1e-6, atol=1e-6)
    network.load_adapter_state(exact)
    assert all(torch.equal(tensor, exact[key]) for key, tensor in network.adapter_state().items())


def test_wrong_files_change_nothing(model: nn.Module) -> None:
    """Missing, left-over and misshapen tensors, another rank, no number as alpha: an error, before any change."""
    network = CONFIG.build(model.targets())
    good = network.adapter_state()
    down = "lora_te_text.lora_down.weight"
    cases = {
        "Missing: lora_te_text.alpha; lora_te_text.lora_down": {k: t for k, t in good.items() if "lora_te" not in k},
        "Unexpected: lora_te2_x.alpha": good | {"lora_te2_x.alpha": torch.tensor(1.0)},
        "lora_te_text: rank 9 in the file, 3 in the config": good | {down: torch.ones(9, 5)},
        "lora_te_text: alpha nan in the file": good | {"lora_te_text.alpha": torch.tensor(torch.nan)},
        "lora_down.weight is [3, 6] in the file, [3, 5] in the network": good | {down: torch.ones(3, 6)},
    }
    for message, tensors in cases.items():
        with pytest.raises(AdapterError, match=f"start.safetensors.*{re.escape(message)}"):
            network.load_adapter_state({k: t + 1 if t.ndim else t for k, t in tensors.items()}, "start.safetensors")
    for key, tensor in network.adapter_state().items():
        assert torch.equal(tensor, good[key])


def test_many_complaints_are_counted(model: nn.Module) -> None:
    """Of many wrong tensors three are named and the others counted."""
    with pytest.raises(AdapterError, match=r"Missing: [^;]+; [^;]+; [^;]+ and 9 more\. Set network\.name"):
        CONFIG.build(model.targets()).load_adapter_state({})


def test_a_step_trains_only_the_factors(model: nn.Module, inputs: Inputs) -> None:
    """A backward pass through the whole model fills the gradients of all factors and of no base weight."""
    network = CONFIG.build(model.targets())
    randomize(network)
    model(*inputs).square().sum().backward()
    for parameter in network.parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad
