"""Anima's transformer and LLM adapter, against diffusers' with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorakit.builtin.attention import EagerConfig
from lorakit.models.families.anima import parts, structure
from lorakit.models.families.anima.llm_adapter import LLMAdapter
from lorakit.models.families.anima.transformer import (
    Patches,
    Sinusoid,
    Transformer,
    angles,
    rotation_of_tokens,
)
from lorakit.models.families.flow.layers import use_backend
from lorakit.models.weights.load import shapes_of, without_weights

TINY = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "mlp_ratio": 2.0, "text_embed_dim": 24, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 4.0, 4.0), "concat_padding_mask": True, "extra_pos_embed_type": None,
}  # fmt: skip
UNLIKE = {**TINY, "in_channels": 3, "out_channels": 5, "attention_head_dim": 20, "num_layers": 1, "mlp_ratio": 3.0}
ADAPTER = {
    "source_dim": 12, "target_dim": 24, "model_dim": 24, "num_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0,
    "target_vocab_size": 40,
}  # fmt: skip


class Exact(TorchFunctionMode):
    """Lets diffusers compute in float64 what it rounds to float32."""

    def __torch_function__(
        self, function: Callable[..., Any], _: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*args, **named)


def both(settings: Mapping[str, Any]) -> tuple[nn.Module, Transformer]:
    """Diffusers' transformer and lorakit's, with the same random weights, in float64."""
    torch.manual_seed(0)
    # It resizes padding masks with torchvision, so it gets the mask as one more channel.
    masked = {"in_channels": settings["in_channels"] + 1, "concat_padding_mask": False}
    theirs = CosmosTransformer3DModel(**{**settings, **masked}).double().eval()
    for parameter in theirs.parameters():  # norms begin as ones
        nn.init.normal_(parameter, std=0.3)
    for block in theirs.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q, block.attn2.norm_k):
            norm.eps = 1e-6  # as in the original code; diffusers' attention has 1e-5
    ours = Transformer(structure.TransformerConfig.of(settings)).double().eval()
    state = theirs.state_dict()
    ours.load_state_dict({name: state[parts.diffusers_name(name)] for name in ours.state_dict()})
    return theirs, ours


def both_adapters(settings: Mapping[str, Any]) -> tuple[nn.Module, LLMAdapter]:
    """Diffusers' adapter and lorakit's, with the same random weights, in float64."""
    torch.manual_seed(0)
    with Exact():
        theirs = AnimaTextConditioner(**settings).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = LLMAdapter(structure.ConditionerConfig.of(settings)).double().eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def compare(theirs: Tensor, ours: Tensor, inputs: list[Tensor]) -> None:
    """Outputs and gradients of inputs agree to 1e-10."""
    factors = torch.linspace(-1, 1, theirs.numel(), dtype=theirs.dtype).view_as(theirs)
    expected, found = ([out, *torch.autograd.grad((out * factors).sum(), inputs)] for out in (theirs, ours))
    for want, have in zip(expected, found, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [TINY, UNLIKE], ids=["tiny", "unlike"])
@pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=str)
def test_transformer_is_that_of_diffusers(settings: dict[str, Any], size: tuple[int, int]) -> None:
    """Outputs and gradients of latents and captions, for images of any shape, each with its own time."""
    theirs, ours = both(settings)
    channels = settings["in_channels"]
    latents, context = torch.randn(2, channels, *size).double(), torch.randn(2, 7, 24).double()
    inputs = [latents.requires_grad_(), context.requires_grad_()]
    times, padding = torch.tensor([0.7, 0.031]).double(), torch.zeros(2, 1, 1, *size).double()
    with Exact():
        (expected,) = theirs(latents.unsqueeze(2), times, context, condition_mask=padding, return_dict=False)
    compare(expected.squeeze(2), ours(latents, times, context), inputs)


@pytest.mark.parametrize("changes", [{}, {"target_dim": 20}], ids=["one width", "two widths"])
def test_adapter_is_that_of_diffusers(changes: dict[str, int]) -> None:
    """Outputs and gradients of the text encoder's states, with captions of different lengths in a batch."""
    theirs, ours = both_adapters(ADAPTER | changes)
    states, ids = torch.randn(2, 5, 12).double().requires_grad_(), torch.randint(40, (2, 7))
    state_mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    id_mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    with Exact():
        expected = theirs(states, ids, id_mask, state_mask)
    found = ours(states, state_mask, ids, id_mask)
    assert found.shape == (2, 512, 24 if not changes else 20)
    assert not found[0, 4:].any()
    assert not found[1, 7:].any()
    compare(expected, found, [states])
    alone = ours(states[:1], state_mask[:1], ids[:1, :4], id_mask[:1, :4])
    torch.testing.assert_close(alone, found[:1], rtol=1e-10, atol=1e-10)


def test_a_caption_without_tokens_asks_nothing() -> None:
    """A row of zeros that is attended to gives what diffusers gives where all rows are masked."""
    theirs, ours = both_adapters(ADAPTER)
    states, ids, valid = torch.zeros(1, 1, 12).double(), torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool)
    with Exact():
        expected = theirs(states, ids, valid, ~valid)
    torch.testing.assert_close(ours(states, valid, ids, valid), expected, rtol=1e-10, atol=1e-10)


def test_structure_is_that_of_the_published_model() -> None:
    """Tensors that settings lead to, settings that tensors lead to, and names that diffusers has for them."""
    transformer = without_weights(lambda: Transformer(structure.TransformerConfig()))
    adapter = without_weights(lambda: LLMAdapter(structure.ConditionerConfig()))
    for module, shapes, infer in (
        (transformer, structure.transformer_shapes, structure.infer_transformer),
        (adapter, structure.conditioner_shapes, structure.infer_conditioner),
    ):
        assert shapes({}) == shapes_of(module)
        assert shapes(infer(shapes_of(module))) == shapes_of(module)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 1_956_405_248
    assert shapes_of(transformer)["x_embedder.proj.1.weight"] == (2048, 68)
    theirs = without_weights(lambda: CosmosTransformer3DModel(num_attention_heads=16, extra_pos_embed_type=None))
    own = shapes_of(transformer)
    assert {parts.diffusers_name(name): shape for name, shape in own.items()} == shapes_of(theirs)
    converted = convert_cosmos_transformer_checkpoint_to_diffusers({f"net.{name}": name for name in own})
    assert converted == {parts.diffusers_name(name): name for name in own}
    assert {parts.original_name(name): name for name in own} == {name: name for name in own}
    assert {parts.original_name(name): own for name, own in converted.items()} == {name: name for name in own}
    assert shapes_of(without_weights(AnimaTextConditioner)) == shapes_of(adapter)


@pytest.mark.parametrize("settings", [{"extra_pos_embed_type": "learnable"}, {"use_layer_norm": True}], ids=str)
def test_settings_of_other_models_are_refused(settings: dict[str, Any]) -> None:
    """Those of Cosmos for videos, or of another adapter."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        structure.TransformerConfig.of(settings)


def test_positions_and_times() -> None:
    """Published numbers: order of patches, angles of tokens, waves of a time."""
    latents = torch.tensor([[[100 * c + 10 * y + x for x in range(6)] for y in range(4)] for c in range(2)])
    tokens = Patches()(latents[None])[0]
    assert tokens[0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111]
    assert tokens[3].tolist() == [20, 21, 30, 31, 120, 121, 130, 131]
    config, cpu = structure.TransformerConfig(), torch.device("cpu")
    cosines, sines = rotation_of_tokens(config, 2, 3, cpu, torch.bfloat16)
    assert cosines.shape == sines.shape == (6, 128)
    assert cosines.dtype == torch.float32
    expected = torch.tensor([1, 0.601757, 0.362111, 0.217903])
    for start, row, column in ((22, 1, 0), (43, 0, 2)):
        token, place = 3 * row + column, slice(start, start + 4)
        torch.testing.assert_close(cosines[token, place], (expected * (row or column)).cos(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sines[token, place], (expected * (row or column)).sin(), rtol=1e-5, atol=1e-6)
    assert torch.equal(cosines[:, :64], cosines[:, 64:])
    assert (cosines[:, :22] == 1).all()
    torch.testing.assert_close(angles(torch.ones(1), 42, 42870.9385)[0, :4], expected, rtol=1e-5, atol=1e-6)
    waves = Sinusoid(2048)(torch.tensor([0.7]))[0]
    torch.testing.assert_close(waves[:3], torch.tensor([0.764842, 0.768865, 0.772822]), rtol=0, atol=1e-6)
    assert Sinusoid(2048)(torch.tensor([0.7], dtype=torch.bfloat16)).dtype == torch.float32


def test_attention_is_by_the_backend() -> None:
    """Attention that is written out gives the same, and no other attention is left."""
    _, transformer = both(TINY)
    _, adapter = both_adapters(ADAPTER)
    masks: list[Tensor | None] = []
    attend = EagerConfig().build()

    def noting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
        masks.append(mask)
        return attend(query, key, value, mask)

    inputs = torch.randn(1, 4, 8, 8).double(), torch.tensor([0.5]).double(), torch.randn(1, 7, 24).double()
    ids, valid = torch.randint(40, (1, 4)), torch.tensor([[True, True, True, False]])
    states = torch.randn(1, 4, 12).double(), valid, ids, valid
    expected = transformer(*inputs), adapter(*states)
    for module in (transformer, adapter):
        use_backend(module, noting)
    found = transformer(*inputs), adapter(*states)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [None if mask is None else mask.sum().item() for mask in masks] == [None] * 4 + [3] * 4
