"""Compiled blocks: the same loss and gradients as without torch.compile, and few graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lorakit.api.components import NetworkConfig
from lorakit.models.families.sd.targets import unet_targets
from lorakit.models.families.sd.unet import BasicTransformerBlock, ResnetBlock2D
from lorakit.models.memory.activation_checkpointing import checkpoint_blocks, checkpointed_blocks
from lorakit.models.memory.compile import compilation_paused, compile_blocks, compile_unsupported_reason
from lorakit.models.memory.quantization import quantize
from lorakit.models.memory.weight_formats import FORMATS
from lorakit.networks.network import Network
from lorakit.plugins.catalog import Catalog
from tests.models.building import stable_diffusion

CPU = torch.device("cpu")
KINDS = (ResnetBlock2D, BasicTransformerBlock)


class Blocks(nn.Module):
    """Two ResNet and two transformer blocks of a U-Net, one after the other, recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(16, 16, time_channels=8, groups=4) for _ in range(2))
        self.attentions = nn.ModuleList(BasicTransformerBlock(16, 8, heads=2) for _ in range(2))
        checkpoint_blocks(checkpointed_blocks(self))

    def forward(self, images: Tensor, times: Tensor, texts: Tensor) -> Tensor:
        """[B, 16, h, w] of images of that shape, times [B, 8] and texts [B, n, 8]."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            hidden = resnet(images, times)
            rows = attention(hidden.flatten(2).transpose(1, 2), texts)
            images = rows.transpose(1, 2).reshape(hidden.shape).contiguous()
        return images


@pytest.fixture(autouse=True)
def _compiles_from_scratch(lorakit_one_thread: None) -> Iterator[None]:
    """Forgets what other tests compiled, and puts the limits back."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()


def adapted(weight_format: str = "", dora: bool = False) -> tuple[Blocks, Network]:
    """The blocks, the same each time, with adapters of all kinds of layers that have an effect, and all dropouts."""
    torch.manual_seed(0)
    blocks = Blocks().requires_grad_(False)
    if weight_format:
        for layer in list(blocks.modules()):
            quantize(layer, weight_format, CPU)
    config = Catalog.discover().find(NetworkConfig, "c3lier")
    rates = {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}
    unet = nn.Module()
    unet.add_module("mid_block", blocks)
    network = config(parts=("unet",), dora=dora, **rates).build(list(unet_targets(unet))).train()
    for adapter in network.adapters:
        nn.init.normal_(adapter.lora_up, std=0.1)
    return blocks, network


def step(blocks: Blocks, network: Network, height: int = 4, width: int = 6) -> list[Tensor]:
    """Loss, and gradients of input and adapters, of a micro-batch with images of that size."""
    generator = torch.Generator().manual_seed(height)
    shapes = ((2, 16, height, width), (2, 8), (2, 5, 8))
    images, times, texts = (torch.randn(shape, generator=generator) for shape in shapes)
    network.begin_batch(torch.tensor([11, 12]))
    loss = blocks(images.requires_grad_(), times, texts).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, [images, *network.parameters_of("unet")])]


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_as_exact_as_not(backend: str, weight_format: str) -> None:
    """With dropout, recomputed activations and small weights, loss and gradients are those without; nothing is left."""
    if reason := compile_unsupported_reason(backend, CPU):
        pytest.skip(reason)
    (blocks, network), expected = adapted(weight_format), step(*adapted(weight_format))
    compile_blocks(blocks, KINDS, backend)
    for new, old in zip(step(blocks, network), expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert counters["frames"]["total"] == counters["frames"]["ok"]


def test_compiled_dora() -> None:
    """DoRA's magnitudes and norms, of 8-bit weights too, are compiled with the blocks, and as exact."""
    (blocks, network), expected = adapted("fp8", dora=True), step(*adapted("fp8", dora=True))
    compile_blocks(blocks, KINDS, "aot_eager")
    for new, old in zip(step(blocks, network), expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_blocks_share_graphs() -> None:
    """Blocks of a kind share a graph though their adapters drop differently; after two sizes, sizes are variables."""
    blocks, network = adapted()
    compile_blocks(blocks, KINDS, "eager")
    graphs = []
    for height, width in ((4, 6), (6, 8), (4, 10)):
        for new, old in zip(step(blocks, network, height, width), step(*adapted(), height, width), strict=True):
            torch.testing.assert_close(new, old)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 4, 4]


def test_nothing_is_compiled_while_it_is_paused() -> None:
    """Meanwhile blocks run eagerly, with the same results; what was compiled is used again afterwards."""
    blocks, network = adapted()
    compile_blocks(blocks, KINDS, "eager")
    step(blocks, network)
    assert counters["stats"]["unique_graphs"] == 2
    with compilation_paused(compiles=True):
        for height in (4, 6, 8):
            for new, old in zip(step(blocks, network, height), step(*adapted(), height), strict=True):
                assert torch.equal(new, old)
    step(blocks, network)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("is_read", [False, True])
def test_blocks_of_a_unet(tiny_sd1_file: Path, is_read: bool) -> None:
    """All ResNet and transformer blocks are compiled, whether the U-Net is read before or after it is asked for."""
    model = stable_diffusion(tiny_sd1_file)
    before = model.denoiser if is_read else None
    model.compile("eager")
    assert before in (None, model.denoiser)
    blocks = [module for module in model.denoiser.modules() if isinstance(module, KINDS)]
    compiled = [module for module in model.denoiser.modules() if module._compiled_call_impl is not None]
    assert compiled == blocks
    assert len(blocks) > 20


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is not there, and a compiler that is not, are told beforehand; eager needs nothing."""
    assert compile_unsupported_reason("eager", CPU) == ""
    assert "'nvfuser'" in compile_unsupported_reason("nvfuser", CPU)
    assert "inductor" in compile_unsupported_reason("nvfuser", CPU)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    assert "install g++" in compile_unsupported_reason("inductor", CPU)
