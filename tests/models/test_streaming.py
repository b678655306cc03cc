"""Weights that stay in the host's memory: the same numbers, in the order that the groups are used in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit.models.families.sd.model import StableDiffusion
from lorakit.models.families.sd.unet import Downsample2D, ResnetBlock2D, Transformer2DModel, Upsample2D
from lorakit.models.memory.block_swap import BlockSwapper, Group, stream, streamed_bytes
from lorakit.models.memory.quantization import QuantizedLayer, is_adaptable, quantize
from lorakit.models.memory.weight_formats import FORMATS
from lorakit.networks.lora import LoRAModule
from tests.models.building import stable_diffusion

CPU = torch.device("cpu")
DEVICES = [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
]  # fmt: skip


def layers(device: torch.device = CPU) -> list[nn.Module]:
    """Layers of three groups, two in each; the groups differ in size."""
    torch.manual_seed(0)
    made = [
        nn.Linear(16, 24), nn.Linear(24, 16, bias=False),
        nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=1),
        nn.Conv2d(16, 32, 1), nn.Linear(3, 5),
    ]  # fmt: skip
    return [layer.to(device).requires_grad_(False) for layer in made]


def grouped(flat: list[nn.Module]) -> list[list[nn.Module]]:
    """The layers in their groups."""
    return [flat[start : start + 2] for start in (0, 2, 4)]


def results(flat: list[nn.Module], device: torch.device) -> Iterator[Tensor]:
    """Outputs and input gradients of the layers, each alone and under an adapter, forwards and then backwards."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for layer in flat:
        shape = (2, 7, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 6, 5)
        for module in (layer, LoRAModule("key", layer, 3, 3.0).to(device)):
            x = torch.randn(shape, generator=generator).to(device).requires_grad_()
            outputs.append((x, module(x)))
    for x, out in reversed(outputs):
        yield out.detach()
        yield torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_those_of_layers_that_are_there(device: str) -> None:
    """Outputs and gradients are the same bit for bit, over and over, and the layers hold no weights of their own."""
    place = torch.device(device)
    plain, streamed = layers(place), layers(place)
    sizes = [layer.weight.nbytes for layer in streamed]
    stream(grouped(streamed), place)
    assert not any(name == "weight" for layer in streamed for name, _ in layer.named_parameters())
    assert not any(True for layer in streamed for _ in layer.buffers())
    assert sum(sizes) <= streamed_bytes(streamed) < sum(sizes) + 256 * len(sizes)
    for _ in range(3):
        for own, expected in zip(results(streamed, place), results(plain, place), strict=True):
            assert torch.equal(own, expected)


@pytest.mark.parametrize("form", FORMATS)
def test_with_fewer_bits(form: str) -> None:
    """What is kept in fewer bits is streamed as it is, and unpacked to the same numbers."""
    small, streamed = layers(), layers()
    for layer in (*small, *streamed):
        quantize(layer, form, CPU)
    held = sum(tensor.nbytes for layer in streamed for tensor in layer.buffers())
    stream(grouped(streamed), CPU)
    assert held <= streamed_bytes(streamed) < held + 3 * 256 * len(streamed)
    for own, expected in zip(results(streamed, CPU), results(small, CPU), strict=True):
        assert torch.equal(own, expected)


def test_a_weight_that_was_asked_for_stays_what_it_is() -> None:
    """A weight may be kept, as autograd does, while its place on the device is taken by others."""
    plain, streamed = layers(), layers()
    stream(grouped(streamed), CPU)
    kept = [layer.weight for layer in streamed]
    assert all(torch.equal(own, layer.weight) for own, layer in zip(kept, plain, strict=True))
    kept[0].zero_()
    assert torch.equal(streamed[0].weight, plain[0].weight)


class Watched(BlockSwapper):
    """A swapper that notes which groups are copied, and whether that was on demand."""

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, CPU)
        self.copies: list[tuple[int, bool]] = []
        self._all = groups

    def _prefetch(self, group: Group) -> object:
        if not any(place.group is group for place in self._slots):
            self.copies.append((self._all.index(group), group is self._current))
        return super()._prefetch(group)


def watched(count: int) -> tuple[Watched, list[Group]]:
    """A swapper for groups of a layer each."""
    made = [nn.Linear(4, number + 1) for number in range(count)]
    stream([[layer] for layer in made], CPU)
    groups = [layer.source.group for layer in made]
    return Watched(groups), groups


def test_groups_are_copied_once_on_each_way_and_ahead() -> None:
    """In the second step, on the way there and back, each group but those at the turns is copied, before its use."""
    swapper, groups = watched(5)
    there_and_back = [*groups, *groups[::-1]]
    for group in there_and_back:
        swapper.fetch(group)
    assert all(on_demand for _, on_demand in swapper.copies[:5])
    swapper.copies.clear()
    for group in there_and_back:
        swapper.fetch(group)
    assert swapper.copies == [(index, False) for index in (2, 3, 4, 2, 1, 0)]


def test_another_order_is_learnt() -> None:
    """Where only the way there is taken, as in previews, all are soon copied ahead, the first ones too."""
    swapper, groups = watched(4)
    for group in [*groups, *groups[::-1]]:
        swapper.fetch(group)
    demanded = []
    for _ in range(3):
        swapper.copies.clear()
        for group in groups:
            swapper.fetch(group)
        demanded.append([index for index, on_demand in swapper.copies if on_demand])
    assert demanded == [[], [0, 1], []]
    assert {index for index, _ in swapper.copies} == {0, 1, 2, 3}


def test_a_single_group_is_copied_once() -> None:
    """What fits into the one place stays there."""
    swapper, (group,) = watched(1)
    for _ in range(3):
        swapper.fetch(group)
    assert swapper.copies == [(0, True)]


def test_groups_of_stable_diffusion(tiny_sd1_file: Path) -> None:
    """Each layer that can be adapted is in one group; groups are transformers, ResNet blocks, samplers, or layers."""
    model = stable_diffusion(tiny_sd1_file)
    unet, encoder = model.denoiser, model.text_encoder.module
    kinds = (Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D)
    blocks = [module for module in unet.modules() if isinstance(module, kinds)]
    text, image = StableDiffusion.modules
    for part, root, owners in ((image, unet, blocks), (text, encoder, list(encoder.get_submodule("encoder.layers")))):
        expected = {frozenset(layer for layer in own.modules() if is_adaptable(layer)) for own in owners}
        groups = part.blocks(root)
        assert {frozenset(group) for group in groups} == expected
        assert len(groups) == len(expected) > 1


def losses(model: StableDiffusion) -> list[Tensor]:
    """Two predictions with gradients of what is put in, one without."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator, requires_grad=True)
    texts = {"hidden_states": torch.randn(1, 77, 32, generator=generator, requires_grad=True)}
    found: list[Tensor] = []
    for _ in range(2):
        out = model.predict(latents, torch.tensor([5]), texts)
        found += [out.detach(), *torch.autograd.grad(out.square().mean(), (latents, texts["hidden_states"]))]
    with torch.no_grad():
        return [*found, model.predict(latents, torch.tensor([7]), texts)]


@pytest.mark.parametrize("recomputed", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["", "int8"])
def test_a_whole_unet(tiny_sd1_file: Path, form: str, recomputed: float) -> None:
    """Predictions and gradients are the same bit for bit, with activations kept or recomputed, read before or after."""
    plain, early, late = (stable_diffusion(tiny_sd1_file) for _ in range(3))
    late.denoiser  # noqa: B018 - reads it
    for model in (plain, early, late):
        model.quantize({"unet": form} if form else {})
        if recomputed:
            model.enable_gradient_checkpointing(recomputed)
    for model in (early, late):
        model.stream(("unet",))
        assert all(
            isinstance(target.module, QuantizedLayer) and target.module.source for target in model.targets(("unet",))
        )
    expected = losses(plain)
    for model in (early, late):
        assert all(torch.equal(own, other) for own, other in zip(losses(model), expected, strict=True))
