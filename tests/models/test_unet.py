"""The U-Net, against diffusers' with the same weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lorakit.api.components import AttentionConfig
from lorakit.builtin.attention import EagerConfig, SdpaConfig
from lorakit.models.families.sd.unet import (
    BasicTransformerBlock,
    ResnetBlock2D,
    UNet,
    timestep_embedding,
    use_backend,
)
from lorakit.models.families.sd.unet_config import UNetConfig
from lorakit.models.memory.activation_checkpointing import checkpoint_blocks, checkpointed_blocks
from lorakit.models.weights.load import without_weights
from lorakit.testing.models import FULL_SD1, FULL_SD2, TINY_SD1, TINY_SD2

SD1, SD2 = TINY_SD1["unet"], TINY_SD2["unet"]
UNLIKE_BOTH = {
    "in_channels": 9,
    "out_channels": 3,
    "block_out_channels": [16, 32, 48],
    "layers_per_block": [2, 1, 3],
    "transformer_layers_per_block": [1, 2, 1],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    "mid_block_type": None,
    "attention_head_dim": [1, 2, 6],
    "cross_attention_dim": 20,
    "norm_num_groups": 8,
    "norm_eps": 1e-3,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
}
"""Every setting that may differ does, the block in the middle is left out, and no two levels are the same."""
KINDS = (
    "Transformer2DModel", "BasicTransformerBlock", "Attention", "FeedForward", "GEGLU", "ResnetBlock2D", "Downsample2D",
    "Upsample2D", "TimestepEmbedding", "Linear", "Conv2d", "GroupNorm", "LayerNorm",
)  # fmt: skip
"""Names of the classes of layers, and of what other trainers' modules look for layers in."""
SETTINGS = pytest.mark.parametrize("settings", [SD1, SD2, UNLIKE_BOTH], ids=["1.x", "2.x", "unlike both"])


@pytest.fixture(autouse=True)
def _one_thread(lorakit_one_thread: None) -> None:
    """Sums are then in the same order in both modules, whatever else the machine does."""


def both(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[UNet2DConditionModel, UNet]:
    """Diffusers' U-Net and lorakit's, with the same random weights and biases."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(settings).to(dtype).eval()
    ours = UNet(UNetConfig.of(settings)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def made_up(settings: dict[str, Any], dtype: torch.dtype, batch: int, height: int, width: int) -> list[Tensor]:
    """Latents, timesteps and captions."""
    latents = torch.randn(batch, settings.get("in_channels", 4), height, width, dtype=dtype)
    text = torch.randn(batch, 7, settings["cross_attention_dim"], dtype=dtype)
    return [latents, torch.randint(1000, (batch,)), text]


def results(unet: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """What the U-Net puts out, and the gradients of the mean square of that, by name."""
    latents, timesteps, text = inputs[0].clone().requires_grad_(), inputs[1], inputs[2].clone().requires_grad_()
    out = unet(latents, timesteps, text)
    out = out if isinstance(out, Tensor) else out.sample
    wanted = {"latents": latents, "text": text, **dict(unet.named_parameters())}
    gradients = torch.autograd.grad(out.square().mean(), list(wanted.values()))
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


@pytest.mark.parametrize(
    "settings", [SD1, SD2, UNLIKE_BOTH, FULL_SD1["unet"], FULL_SD2["unet"], {}],
    ids=["1.x", "2.x", "unlike both", "whole 1.x", "whole 2.x", "defaults"],
)  # fmt: skip
def test_weights_are_interchangeable(settings: dict[str, Any]) -> None:
    """Tensors have diffusers' names, shapes and order, and the modules that hold them its classes' names."""
    theirs = without_weights(lambda: UNet2DConditionModel.from_config(settings))
    ours = without_weights(lambda: UNet(UNetConfig.of(settings)))
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    assert all(found[name].shape == tensor.shape for name, tensor in expected.items())
    placed = [(path, type(module).__name__) for path, module in theirs.named_modules()]
    named = [(path, type(module).__name__) for path, module in ours.named_modules()]
    assert [found for found in named if found[1] in KINDS] == [found for found in placed if found[1] in KINDS]


@SETTINGS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 16, 8), (2, 13, 9), (2, 6, 11)], ids=str)
def test_outputs_and_gradients_are_those_of_diffusers(
    settings: dict[str, Any], dtype: torch.dtype, size: tuple[int, int, int]
) -> None:
    """Outputs, and gradients of inputs and weights, are the same bit for bit, odd sizes included.

    But for the time embedding's own: its gradients of all blocks are summed before SiLU, not behind. In bfloat16 some
    processors choose kernels by how tensors lie in memory, which differs; so there both are compared with float64.
    """
    theirs, ours = both(settings, dtype)
    inputs = made_up(settings, dtype, *size)
    expected, found = results(theirs, inputs), results(ours, inputs)
    assert found.keys() == expected.keys()
    others = {name for name, tensor in expected.items() if not torch.equal(found[name], tensor)}
    assert dtype == torch.bfloat16 or all(name.startswith("time_embedding.") for name in others), others
    if dtype == torch.bfloat16:
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
        exact = results(theirs.double(), wide)
        off = [torch.stack([(own[name] - exact[name]).norm() for name in exact]) for own in (found, expected)]
        # On processors with AMX, PyTorch's convolutions in bfloat16 give NaN now and then, whosever module calls them.
        assert (off[0].isnan() | off[1].isnan() | (off[0] <= 2 * off[1] + 1e-6)).all()
        return
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= {torch.float64: 1e-10, torch.float32: 1e-5}[dtype] * tensor.norm(), name
    assert all(tensor.any() for name, tensor in found.items() if "to_q" not in name and "to_k" not in name)


@pytest.mark.parametrize("backend", [SdpaConfig, EagerConfig])
@pytest.mark.parametrize("upcast", [False, True])
def test_every_backend_gives_the_same(backend: type[AttentionConfig], upcast: bool) -> None:
    """With each attention backend, upcast or not, outputs and gradients are diffusers', but for rounding."""
    settings = {**SD2, "upcast_attention": upcast}
    theirs, ours = both(settings)
    use_backend(ours, backend().build())
    inputs = made_up(settings, torch.float32, 2, 10, 8)
    expected, found = results(theirs, inputs), results(ours, inputs)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-8, name


@SETTINGS
def test_attention_needs_no_mask(settings: dict[str, Any]) -> None:
    """Backends get queries, keys and values alone, so that PyTorch may use kernels that take no mask."""
    calls = []

    def noting(*tensors: Tensor) -> Tensor:
        calls.append(len(tensors))
        return scaled_dot_product_attention(*tensors)

    _, unet = both(settings)
    use_backend(unet, noting)
    unet(*made_up(settings, torch.float32, 2, 8, 8))
    assert set(calls) == {3}


@SETTINGS
def test_recomputing_changes_nothing(settings: dict[str, Any]) -> None:
    """Told to recompute, every ResNet and transformer block runs twice, and all results stay the same, bit for bit."""
    _, unet = both(settings)
    inputs = made_up(settings, torch.float32, 2, 8, 8)
    expected = results(unet, inputs)
    checkpoint_blocks(checkpointed_blocks(unet))
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D | BasicTransformerBlock)]
    runs = dict.fromkeys(unet.modules(), 0)
    for module in runs:
        module.register_forward_pre_hook(lambda module, _: runs.update({module: runs[module] + 1}))
    with torch.no_grad():
        unet(*inputs)
    assert {runs[block] for block in blocks} == {1}
    found = results(unet, inputs)
    assert {runs[block] for block in blocks} == {3}
    assert runs[unet] == runs[unet.conv_in] == runs[unet.down_blocks[0]] == 2
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("cosines_first", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_waves_of_timesteps(cosines_first: bool, shift: int) -> None:
    """Waves are diffusers' bit for bit, and the formula's in float64 as near as float32 angles let them be."""
    timesteps = torch.tensor([0, 1, 37, 500, 999])
    found = timestep_embedding(timesteps, 32, cosines_first, shift)
    assert torch.equal(found, get_timestep_embedding(timesteps, 32, cosines_first, shift))
    angles = timesteps.double().unsqueeze(1) * 10000.0 ** (-torch.arange(16).double() / (16 - shift))
    exact = torch.cat([angles.cos(), angles.sin()] if cosines_first else [angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("center_input_sample", True), ("only_cross_attention", True), ("only_cross_attention", [True] * 4),
        ("reverse_transformer_layers_per_block", [1] * 4), ("encoder_hid_dim", 8),
        ("encoder_hid_dim_type", "text_proj"), ("num_attention_heads", 4), ("dual_cross_attention", True),
        ("class_embed_type", "timestep"), ("addition_embed_type", "text"), ("num_class_embeds", 10),
        ("time_embedding_dim", 64),
        ("time_embedding_act_fn", "silu"), ("timestep_post_act", "silu"), ("time_cond_proj_dim", 8),
        ("class_embeddings_concat", True), ("act_fn", "gelu"), ("attention_type", "gated"), ("conv_in_kernel", 1),
        ("conv_out_kernel", 1), ("downsample_padding", 0), ("mid_block_scale_factor", 2),
        ("mid_block_type", "UNetMidBlock2D"), ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_type", "fourier"),
    ],
)  # fmt: skip
def test_settings_of_other_models_are_refused(name: str, value: object) -> None:
    """A setting that would change the computation, and that no Stable Diffusion 1.x or 2.x has, is named."""
    with pytest.raises(ValueError, match=rf"^{name} is "):
        UNetConfig.of({**SD1, name: value})


def test_all_settings_of_diffusers_are_known_or_make_no_difference() -> None:
    """Settings that are not looked at are the few that diffusers ignores in these models, with whatever value."""
    ignored = {
        "sample_size": 17,
        "dropout": 0.5,
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 2.0,
        "mid_block_only_cross_attention": True,
        "cross_attention_norm": "layer_norm",
        "addition_embed_type_num_heads": 3,
    }
    defaults = dict(without_weights(lambda: UNet2DConditionModel(**SD1)).config)
    refused = set()
    for name in defaults:
        try:
            UNetConfig.of({name: object()})
        except ValueError:
            refused.add(name)
    looked_at = refused | {field.name for field in UNetConfig.__attrs_attrs__}
    assert {name for name in defaults if not name.startswith("_")} - looked_at == ignored.keys()
    theirs, ours = both({**SD1, **ignored})
    assert UNetConfig.of(defaults) == UNetConfig.of(SD1) == ours.settings
    inputs = made_up(SD1, torch.float32, 1, 8, 8)
    assert torch.equal(ours(*inputs), theirs(*inputs).sample)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "'AttnDownBlock2D'"),
        ({"up_block_types": ["DownBlock2D"] * 4}, "'DownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types has 3 entries, but block_out_channels 4"),
        ({"attention_head_dim": [1, 2]}, "attention_head_dim has 2 entries"),
        ({"attention_head_dim": 5}, "32 channels cannot be shared by 5 attention heads"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings: dict[str, Any], message: str) -> None:
    """Unknown blocks, lists of the wrong length and heads that do not fit are named."""
    with pytest.raises(ValueError, match=message):
        without_weights(lambda: UNet(UNetConfig.of({**SD1, **settings})))


def test_it_needs_nothing_but_torch() -> None:
    """A U-Net is built, used and trained through with neither diffusers, transformers nor torch's compiler imported."""
    code = (
        "import sys, torch\n"
        "from lorakit.models.families.sd.unet import UNet\n"
        "from lorakit.models.families.sd.unet_config import UNetConfig\n"
        f"unet = UNet(UNetConfig.of({SD1!r}))\n"
        "unet(torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 7, 32)).sum().backward()\n"
        "print([m for m in ('diffusers', 'transformers', 'peft', 'torch._dynamo', 'sympy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
