from __future__ import annotations

import math

import pytest
import torch

from lorakit.builtin.attention.eager import EagerConfig
from lorakit.builtin.attention.sdpa import SdpaConfig
from lorakit.components import AttentionConfig


@pytest.mark.parametrize("config", [SdpaConfig, EagerConfig])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_is_attention(config: type[AttentionConfig], dtype: torch.dtype, tolerance: float) -> None:
    """The result and its gradients are those of softmax(q·kᵀ/√d)·v in float64, in the inputs' dtype."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 16).to(dtype).requires_grad_() for tokens in (10, 7, 7))
    result = config().build()(query, key, value)
    assert result.dtype == dtype
    assert result.shape == (2, 3, 10, 16)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    expected = torch.softmax(exact[0] @ exact[1].mT / math.sqrt(16), -1) @ exact[2]
    grad = torch.randn_like(result)
    actual = (result, *torch.autograd.grad(result, (query, key, value), grad))
    for one, other in zip(actual, (expected, *torch.autograd.grad(expected, exact, grad.double())), strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() < tolerance


@pytest.mark.parametrize("config", [SdpaConfig, EagerConfig])
@pytest.mark.parametrize("size", [120.0, 500.0])
def test_scores_do_not_overflow_in_fp16(config: type[AttentionConfig], size: float) -> None:
    """Scores near and above the top of float16 still give weights that add up to 1."""
    query = torch.full((1, 1, 2, 4), size, dtype=torch.float16)
    value = torch.ones(1, 1, 2, 4, dtype=torch.float16)
    assert torch.equal(config().build()(query, query, value), value)
