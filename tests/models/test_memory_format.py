"""Images with channels last in memory: the same prediction and gradients, but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.api.components import NetworkConfig
from lorakit.models.families.sd.unet import ResnetBlock2D
from lorakit.models.memory.channels_last import memory_format_of
from lorakit.plugins.catalog import Catalog
from tests.models.building import stable_diffusion


def step(path: Path, dora: bool, on: bool, read_before: bool) -> list[Tensor]:
    """Prediction, and gradients of adapters of all kinds of layers; images of an odd size."""
    model = stable_diffusion(path, dtype=torch.float64)
    if read_before:
        assert model.denoiser is not None
    model.use_channels_last(on)
    config = Catalog.discover().find(NetworkConfig, "c3lier")(parts=("unet",), dora=dora)
    network = config.build(model.targets(["unet"]))
    generator = torch.Generator().manual_seed(0)
    for adapter in network.adapters:
        torch.nn.init.normal_(adapter.lora_up, std=0.1, generator=generator)
    images = []
    hooks = [
        module.register_forward_hook(lambda _, __, image: images.append(image))
        for module in model.denoiser.modules()
        if isinstance(module, ResnetBlock2D)
    ]
    shapes = ((2, 4, 9, 6), (2, 7, 32))
    latents, states = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    prediction = model.predict(latents, torch.tensor([3, 700]), {"hidden_states": states})
    for hook in hooks:
        hook.remove()
    wide = [image for image in images if image.shape[-1] > 1]
    assert {memory_format_of(image) for image in wide} == {torch.channels_last if on else torch.contiguous_format}
    return [prediction, *torch.autograd.grad(prediction.square().mean(), network.parameters_of("unet"))]


@pytest.mark.usefixtures("lorakit_one_thread")
@pytest.mark.parametrize(("dora", "read_before"), [(False, True), (True, False)])
def test_channels_last_only_rounds(tiny_sd1: Path, dora: bool, read_before: bool) -> None:
    """With channels last, U-Net and adapters compute in float64 what they compute with channels first."""
    first, last = (step(tiny_sd1, dora, on, read_before) for on in (False, True))
    for one, other in zip(first, last, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7 * max(1.0, one.abs().max().item()))
