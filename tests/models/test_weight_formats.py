"""Forms of weights in fewer bits: how far off, for weights of any size and shape, and what others have for the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.models.memory import weight_formats
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


class Operations(TorchDispatchMode):
    """Notes the operations that read or write memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of(weight_format: str, dtype: torch.dtype, device: str) -> list[str]:
    """What restores a weight of a dtype on a device."""
    form = FORMATS[weight_format]
    packed = {name: tensor.to(device) for name, tensor in form.pack(torch.randn(6, 64, dtype=dtype)).items()}
    with Operations() as operations:
        assert form.unpack(packed, (6, 64), dtype).dtype == dtype
    return operations.names


@pytest.fixture
def nf4_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel of bitsandbytes for CPUs, used as that for GPUs is."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(weight_formats, "_NF4_KERNEL_DEVICES", ("cpu",))
    weight_formats._has_nf4_kernel.cache_clear()
    yield
    weight_formats._has_nf4_kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_are_restored_in_few_passes(device: str, dtype: torch.dtype) -> None:
    """One for int8, but in float32 on CPUs, two for fp8, three for nf4 without a kernel; `meta` is as GPUs are."""
    cast = ["_to_copy", "mul_"]
    assert operations_of("int8", dtype, device) == (cast if (device, dtype) == ("cpu", torch.float32) else ["mul"])
    assert operations_of("fp8", dtype, device) == cast
    assert operations_of("nf4", dtype, device) == ["_to_copy", "index_select", "mul_"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_the_product_is_rounded_once(weight_format: str, dtype: torch.dtype) -> None:
    """In one pass or two, a weight is the product in float32, or in a longer dtype, rounded to the dtype."""
    form = FORMATS[weight_format]
    packed = form.pack(torch.randn(24, 512))
    wide = torch.promote_types(dtype, torch.float32)
    expected = (packed["stored"].to(wide) * packed["scale"].to(wide)).to(dtype)
    assert torch.equal(form.unpack(packed, (24, 512), dtype), expected)


@pytest.mark.usefixtures("nf4_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 64), (16, 8, 3, 3), (3, 10)])
def test_nf4_is_restored_by_the_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """In one pass, and as without it but for the rounding of the levels."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02
    packed = FORMATS["nf4"].pack(weight)
    assert packed.keys() == {"stored", "scale"}
    with Operations() as operations:
        found = FORMATS["nf4"].unpack(packed, shape, dtype)
    assert "dequantize_4bit" in operations.names
    assert (found.dtype, found.shape) == (dtype, shape)
    levels = torch.tensor(list(product(NF4_LEVELS, repeat=2)))
    exact = FORMATS["nf4"].unpack({**packed, "levels": levels}, shape, torch.float64)
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.usefixtures("nf4_kernel")
@pytest.mark.parametrize("trouble", [RuntimeError("no library for this device"), None])
def test_a_kernel_that_does_not_do_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch, trouble: RuntimeError | None
) -> None:
    """Where bitsandbytes' kernel fails, or gives other weights, they are restored without it."""

    def broken(stored: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if trouble is not None:
            raise trouble
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(weight_formats, "_nf4_kernel", broken)
    weight = torch.tensor(NF4_LEVELS).repeat(4).view(1, 64)
    assert torch.equal(kept("nf4", weight).float(), weight)
