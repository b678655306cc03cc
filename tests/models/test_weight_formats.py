"""Forms of weights in fewer bits: how far off, for weights of any size and shape, and what others have for the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorakit.models.memory.weight_formats import FORMATS, NF4_LEVELS

SHAPES = [(16, 512), (16, 8, 3, 3), (5, 13), (1, 1)]


def kept(weight_format: str, weight: Tensor) -> Tensor:
    """A weight after it was packed, in float64."""
    form = FORMATS[weight_format]
    return form.unpack(form.pack(weight), weight.shape, torch.float64)


def farthest(weight_format: str, weight: Tensor) -> Tensor:
    """How far each weight may be off by the formats' definitions, float64 of the weight's shape."""
    if weight_format == "nf4":
        values = weight.flatten()
        blocks = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 64)
        half_gap = max(high - low for low, high in pairwise(NF4_LEVELS)) / 2
        bounds = half_gap * blocks.abs().amax(1, keepdim=True).expand(-1, 64)
        return bounds.flatten()[: len(values)].view(weight.shape)
    largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
    if weight_format == "int8":
        return (largest / 254).expand(weight.shape)
    return torch.maximum(weight.abs() / 16, largest / 458_752)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_no_weight_is_further_off_than_the_format_says(
    weight_format: str, shape: tuple[int, ...], size: float, dtype: torch.dtype
) -> None:
    """Weights of any size and shape, and of very different ones side by side, are off by no more than the bound."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * size
    weight *= torch.logspace(-6, 0, weight.numel()).view(shape)
    weight[len(weight) // 2] *= weight.shape != (5, 13)  # a channel of zeros
    packed = FORMATS[weight_format].pack(weight.to(dtype))
    weight = weight.to(dtype).double()
    # 1e-4: numbers half-way between two of int8's, as divided by their scales in float32.
    assert ((kept(weight_format, weight) - weight).abs() <= farthest(weight_format, weight) * (1 + 1e-4)).all()
    back = FORMATS[weight_format].unpack(packed, shape, dtype)
    assert (back.dtype, back.shape) == (dtype, shape)
    # The levels of NF4 are rounded to the format to compute in before they are multiplied, those of the others not.
    rounding = torch.finfo(dtype).eps * (1 if weight_format == "nf4" else 0.5)
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(back.double(), kept(weight_format, weight), rtol=1.01 * rounding + 1e-7, atol=smallest)


def test_mean_errors() -> None:
    """Of normally distributed weights, int8 is off by less than fp8, and that by less than nf4, as documented."""
    weight = torch.randn(320, 2880, generator=torch.Generator().manual_seed(0)).double() * 0.02
    errors = {form: ((kept(form, weight) - weight).norm() / weight.norm()).item() for form in FORMATS}
    assert errors == pytest.approx({"fp8": 0.0263, "int8": 0.0085, "nf4": 0.0919}, abs=5e-4)


def test_fp8_is_more_exact_than_a_bare_cast() -> None:
    """With small weights, as base models have, the scales make what a cast to float8 loses survive."""
    weight = torch.randn(320, 320, generator=torch.Generator().manual_seed(0)) * 0.005
    for back, is_near in ((kept("fp8", weight), True), (weight.to(torch.float8_e4m3fn), False)):
        assert ((back.double() - weight).norm() < 0.03 * weight.norm()) == is_near


@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_what_is_no_number_stays_none(weight_format: str) -> None:
    """Weights of a damaged model, infinite or no number, do not become plausible ones."""
    for broken in (float("nan"), float("inf")):
        weight = torch.ones(3, 64)
        weight[1, 5] = broken
        assert not kept(weight_format, weight)[1].isfinite().all()
        assert kept(weight_format, weight)[0].isfinite().all()


def test_levels_of_nf4() -> None:
    """The levels are those of bitsandbytes, which QLoRA's authors wrote, up to float32's rounding; each is kept."""
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu")
    ours = torch.tensor(NF4_LEVELS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-7)
    weight = ours.repeat(4).view(1, 64)
    assert torch.equal(kept("nf4", 0.5 * weight).float(), 0.5 * weight)


@pytest.mark.parametrize("shape", [(48, 64), (16, 8, 3, 3)])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, ...]) -> None:
    """Bytes, scales and weights are those of bitsandbytes, whose kernels read what is kept here."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, state = functional.quantize_nf4(weight, blocksize=64)
    ours = FORMATS["nf4"].pack(weight)
    assert torch.equal(ours["stored"].flatten(), codes.flatten())
    assert torch.equal(ours["scale"].flatten(), state.absmax)
    theirs = functional.dequantize_nf4(codes, state)
    torch.testing.assert_close(kept("nf4", weight).float(), theirs, rtol=0, atol=3e-7 * 0.1)
