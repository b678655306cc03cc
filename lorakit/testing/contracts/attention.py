"""What every attention backend must do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorakit.api.components import AttentionConfig
from lorakit.models.interfaces import AttentionBackend
from lorakit.testing.contracts.component import ComponentContract

SHAPES = {"self": (64, 64, 40), "cross": (64, 77, 40), "wide": (16, 16, 160), "long-caption": (16, 227, 80)}
"""Tokens of the image, tokens attended to, and channels per head, as in Stable Diffusion's U-Net."""
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


class AttentionContract(ComponentContract):
    """What every attention backend must do: softmax(q·kᵀ/√d)·v, with masks and without, and its gradients.

        class TestBlockwise(AttentionContract):
            config = BlockwiseConfig(block=512)

    A kernel for one kind of device sets `device`, and skips its tests where there is none.
    """

    config: AttentionConfig
    device = "cpu"
    """Where to test it: a kernel for one kind of device says so here."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    """Number formats that it must compute in."""

    @shapes
    def test_equals_the_formula(self, shape: tuple[int, int, int]) -> None:
        """Self- and cross-attention equal the formula in float64 as closely as the number format allows."""
        attend = self.config.build()
        for dtype in self.dtypes:
            inputs = _inputs(shape, dtype, self.device)
            expected = reference(*(tensor.double() for tensor in inputs))
            result = attend(*inputs)
            assert result.dtype == dtype
            assert result.shape == inputs[0].shape
            _assert_close(result, expected, dtype)

    @shapes
    def test_has_the_formulas_gradients(self, shape: tuple[int, int, int]) -> None:
        """The gradients of queries, keys and values equal those of the formula in float64."""
        attend = self.config.build()
        for dtype in self.dtypes:
            inputs = [tensor.requires_grad_() for tensor in _inputs(shape, dtype, self.device)]
            exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
            grad_out = _inputs(shape, dtype, self.device)[0]
            found = _with_gradients(attend, inputs, grad_out)
            expected = _with_gradients(reference, exact, grad_out.double())
            for own, exactly in zip(found[1:], expected[1:], strict=True):
                _assert_close(own, exactly, dtype)

    @shapes
    def test_honours_masks(self, shape: tuple[int, int, int]) -> None:
        """Keys that a mask excludes get no weight: results and gradients equal those of the formula in float64."""
        attend = self.config.build()
        mask = _mask(shape[1]).to(self.device)
        for dtype in self.dtypes:
            query, key, value = _inputs(shape, dtype, self.device)
            # What is masked would outweigh all else.
            keep = mask.view(2, 1, -1, 1)
            key, value = (torch.where(keep, tensor, 30 * tensor) for tensor in (key, value))
            inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
            exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
            grad_out = _inputs(shape, dtype, self.device)[0]
            found = _with_gradients(attend, inputs, grad_out, mask)
            expected = _with_gradients(reference, exact, grad_out.double(), mask)
            for own, exactly in zip(found, expected, strict=True):
                _assert_close(own, exactly, dtype)

    def test_bears_large_scores(self) -> None:
        """Scores in the hundreds, whose exponentials overflow, still give finite weights that sum to one."""
        query, key, value = _inputs(SHAPES["self"], torch.float32, self.device)
        result = self.config.build()(100 * query, 100 * key, torch.ones_like(value))
        torch.testing.assert_close(result, torch.ones_like(result))

    def test_does_not_change_its_inputs(self) -> None:
        """Queries, keys and values are as they were; other layers need them again for their gradients."""
        inputs = _inputs(SHAPES["cross"], torch.float32, self.device)
        before = [tensor.clone() for tensor in inputs]
        self.config.build()(*inputs)
        assert all(torch.equal(now, old) for now, old in zip(inputs, before, strict=True))


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
    """softmax(q·kᵀ/√d)·v of [B, heads, tokens, d], written out; keys get no weight where a mask is false."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), value)


def _with_gradients(
    attend: AttentionBackend, inputs: Sequence[Tensor], grad_out: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """The result, and the gradients of queries, keys and values."""
    query, key, value = inputs
    result = attend(query, key, value, mask)
    return [result, *torch.autograd.grad(result, (query, key, value), grad_out)]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key and value as the U-Net hands them over: views of [B, tokens, heads·d]."""
    queries, keys, channels = shape
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, tokens, 4 * channels, generator=generator) for tokens in (queries, keys, keys)]
    return [tensor.to(device, dtype).view(*tensor.shape[:2], 4, channels).transpose(1, 2) for tensor in drawn]


def _mask(keys: int) -> Tensor:
    """For two images: without some of the keys, among them the last third, and with all."""
    kept = torch.rand(keys, generator=torch.Generator().manual_seed(1)) < 0.7
    kept[0], kept[keys - keys // 3 :] = True, False
    return torch.stack([kept, torch.ones_like(kept)]).view(2, 1, 1, keys)


def _assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Close within some roundings of the number format, measured against the largest number."""
    tolerance = 16 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
