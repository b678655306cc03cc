"""The U-Net's attention through a backend, against diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorakit.builtin.attention import EagerConfig
from lorakit.models.families.sd import unet
from lorakit.models.families.sd.unet import Attention
from tests.models.building import stable_diffusion


class Recorder:
    """Attention of PyTorch that notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Size, torch.Size, torch.dtype]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Scaled dot-product attention."""
        assert key.shape == value.shape
        self.calls.append((query.shape, key.shape, query.dtype))
        return scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("context", [None, 24])
def test_attention_is_that_of_diffusers(context: int | None) -> None:
    """Self- and cross-attention agree with diffusers' plain processor."""
    torch.manual_seed(0)
    theirs = DiffusersAttention(query_dim=32, cross_attention_dim=context, heads=4, dim_head=8).eval()
    theirs.set_processor(AttnProcessor())
    attention = Attention(32, context or 32, heads=4)
    attention.load_state_dict(theirs.state_dict())
    attention.backend = backend = Recorder()
    hidden = torch.randn(2, 10, 32)
    states = None if context is None else torch.randn(2, 7, context)
    expected = theirs(hidden, encoder_hidden_states=states)
    torch.testing.assert_close(attention(hidden, hidden if states is None else states), expected)
    assert backend.calls == [((2, 4, 10, 8), (2, 4, 10 if context is None else 7, 8), torch.float32)]


def upcasting(dtype: torch.dtype, size: float = 1.0) -> tuple[DiffusersAttention, Attention]:
    """Attention of diffusers and lorakit's, both with scores in float32, `size` times as large as usual ones."""
    torch.manual_seed(0)
    theirs = DiffusersAttention(query_dim=32, heads=4, dim_head=8, upcast_attention=True).eval()
    with torch.no_grad():
        for projection in (theirs.to_q, theirs.to_k):
            projection.weight *= size**0.5
    attention = Attention(32, 32, heads=4, upcasts=True)
    attention.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), attention.to(dtype)


@pytest.mark.parametrize("size", [1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_attention_is_that_of_diffusers(dtype: torch.dtype, size: float) -> None:
    """Fused, it is diffusers' fused attention bit for bit, with scores beyond float16, too; written out, it is near."""
    theirs, attention = upcasting(dtype, size)
    tokens = torch.randn(2, 10, 32).to(dtype)
    queries, keys = (layer(tokens).float().unflatten(-1, (4, 8)) for layer in (theirs.to_q, theirs.to_k))
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys)
    assert (scores.abs().max() > torch.finfo(torch.float16).max) == (size > 1)
    theirs.set_processor(AttnProcessor2_0())
    expected = theirs(tokens)
    assert torch.equal(attention(tokens, tokens), expected)
    attention.backend = EagerConfig().build()
    theirs.set_processor(AttnProcessor())
    for other in (expected, theirs(tokens)):
        error = (attention(tokens, tokens).float() - other.float()).norm() / other.float().norm()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "upcast"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
@pytest.mark.parametrize("devices", [(), ("cpu",)])
def test_only_some_devices_need_longer_numbers(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], dtype: torch.dtype, upcast: torch.dtype
) -> None:
    """Where kernels may not compute scores in float32, the backend gets float32 at least; the result is as always."""
    monkeypatch.setattr(unet, "_UPCAST_DEVICES", devices)
    _, attention = upcasting(dtype)
    attention.backend = backend = Recorder()
    tokens = torch.randn(1, 5, 32, dtype=dtype)
    assert attention(tokens, tokens).dtype == dtype
    assert backend.calls[0][2] == (upcast if devices else dtype)


@pytest.mark.parametrize("before_reading", [True, False])
def test_backend_computes_all_attention_of_the_unet(tiny_sd1_file: Path, before_reading: bool) -> None:
    """Chosen before or after the U-Net is read, the backend computes every attention and changes no prediction."""
    model, backend = stable_diffusion(tiny_sd1_file), Recorder()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), {"hidden_states": torch.randn(2, 77, 32)})
    expected = stable_diffusion(tiny_sd1_file).predict(*inputs)
    if not before_reading:
        assert model.denoiser
    model.use_attention(backend)
    torch.testing.assert_close(model.predict(*inputs), expected)
    attentions = [module for module in model.denoiser.modules() if isinstance(module, Attention)]
    assert len(backend.calls) == len(attentions) == 20
