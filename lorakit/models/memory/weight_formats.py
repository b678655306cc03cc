"""Formats of quantized weights.

Shapes: a weight is [out, …]; blocks are what is left of the weight, flattened, when it is cut into pieces of 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise, product
from statistics import NormalDist
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from attrs import frozen
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny
_BLOCK = 64
_NF4_KERNEL_DEVICES = ("cuda",)
"""Where bitsandbytes is asked for its kernel; on CPUs it would save less than importing it takes."""


class WeightFormat(Protocol):
    """A way to store weights, and to restore them approximately."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors to store of a weight, by name, on its device."""

    def unpack(self, kept: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight of this shape in `dtype`, a new tensor, from the stored tensors."""


@frozen
class PerChannel:
    """A byte for each weight, with a scale for each output channel that makes its largest weight the largest number.

    As float8 e4m3 (Micikevicius et al., 2022, arXiv:2209.05433), a weight is wrong by at most a sixteenth, or by a
    458,752nd of the largest in its channel where that is more; as int8, by at most a 254th of the largest in its
    channel. What the number format to compute in rounds away comes on top.
    """

    dtype: torch.dtype
    """The dtype of one byte."""
    largest: float
    """The largest of its numbers to use."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """`stored`, the weight divided by its scale, [out, …], and `scale`, float32 [out, 1, …]."""
        exact = weight.float()
        largest = exact.abs().amax(dim=tuple(range(1, exact.ndim)), keepdim=True)
        scale = (largest / self.largest).clamp(min=_TINY)
        scaled = exact / scale
        # A cast rounds to the nearest number of floating-point formats, but to zero in others.
        return {"stored": (scaled if self.dtype.is_floating_point else scaled.round_()).to(self.dtype), "scale": scale}

    def unpack(self, kept: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """The weight, rounded to `dtype` once; computed in float32, or on CPUs in a longer dtype."""
        stored, scale = kept["stored"], kept["scale"]
        # PyTorch has no multiplication for float8, and CPUs first make a float32 copy of int8.
        if self.dtype.is_floating_point or (stored.device.type == "cpu" and dtype.itemsize > 2):
            return stored.to(dtype).mul_(scale)
        return torch.mul(stored, scale, out=torch.empty_like(stored, dtype=dtype))


class NormalFloat4:
    """Half a byte for each weight, with a scale for each block: QLoRA's NF4 (Dettmers et al., 2023, arXiv:2305.14314).

    A weight is the nearest of 16 levels times the largest weight of its block, and wrong by at most half of the widest
    gap between levels, which is 0.152 of that largest weight. On GPUs it is restored by bitsandbytes' kernel if that is
    installed: in one pass, rounded once.
    """

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """`stored`, two levels in each byte, uint8 [blocks, 32], and `scale`, float32 [blocks, 1].

        Where no kernel restores the weight, also `levels`, those of each byte in the weight's dtype, [256, 2].
        """
        values = weight.float().flatten()
        blocks = F.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
        scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=_TINY)
        middles = torch.tensor([(low + high) / 2 for low, high in pairwise(NF4_LEVELS)], device=weight.device)
        codes = torch.bucketize(blocks / scale, middles, out_int32=True).to(torch.uint8)
        packed = {"stored": codes[:, ::2] << 4 | codes[:, 1::2], "scale": scale}
        if not _has_nf4_kernel(weight.device):
            # Those of a whole byte, so that none need be taken apart.
            packed["levels"] = torch.tensor(list(product(NF4_LEVELS, repeat=2)), device=weight.device).to(weight.dtype)
        return packed

    def unpack(self, kept: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight, computed in `dtype`, or by the kernel in float32."""
        if "levels" not in kept:
            return _nf4_kernel(kept["stored"], kept["scale"], shape, dtype)
        levels = kept["levels"].to(dtype).index_select(0, kept["stored"].flatten().int())
        return levels.view(-1, _BLOCK).mul_(kept["scale"]).flatten()[: math.prod(shape)].view(*shape)


class Unquantized:
    """The weight itself, in its dtype."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """`stored`, the weight itself."""
        return {"stored": weight}

    def unpack(self, kept: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """A copy, as the stored tensor may be overwritten at any time."""
        return kept["stored"].to(dtype, copy=True)


def _nf4_kernel(stored: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of this shape in float32 or a shorter dtype, by bitsandbytes' kernel."""
    used = stored.flatten()[: -(-math.prod(shape) // 2)]
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(used, scale.flatten(), _BLOCK, "nf4", shape, dtype)
    return weight


@cache
def _has_nf4_kernel(device: torch.device) -> bool:
    """Whether bitsandbytes restores NF4 on a device, as a try shows."""
    if device.type not in _NF4_KERNEL_DEVICES:
        return False
    try:
        import bitsandbytes  # noqa: F401  # registers its operations

        every = torch.arange(256, dtype=torch.uint8, device=device)
        found = _nf4_kernel(every, torch.ones(8, device=device), (8, _BLOCK), torch.float32)
    except Exception:  # not installed, an older one, or one without a library for this device
        return False
    expected = torch.tensor(list(product(NF4_LEVELS, repeat=2)), device=device)
    return torch.allclose(found.flatten(), expected.flatten(), rtol=0, atol=1e-6)


def _normal_levels() -> tuple[float, ...]:
    """Quantiles of a normal distribution, -1 to 1: zero with 7 below and 8 above, evenly spaced in probability."""
    quantile, last = NormalDist().inv_cdf, 1 - (1 / 32 + 1 / 30) / 2

    def side(count: int) -> list[float]:
        return [quantile(0.5 + (last - 0.5) * step / count) / quantile(last) for step in range(1, count + 1)]

    return (*(-level for level in reversed(side(7))), 0.0, *side(8))


NF4_LEVELS = _normal_levels()
"""The 16 levels of NF4, in ascending order."""

FORMATS: Mapping[str, WeightFormat] = {
    "fp8": PerChannel(torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
    "int8": PerChannel(torch.int8, 127),
    "nf4": NormalFloat4(),
}
"""The formats by their names in configs."""
