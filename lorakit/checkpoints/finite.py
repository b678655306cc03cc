"""Whether a file of weights holds NaN or infinity, by the bits of its numbers; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path

from attrs import frozen

from lorakit.checkpoints.pytorch_file import pickled_tensors
from lorakit.checkpoints.safetensors_header import read_safetensors_header
from lorakit.checkpoints.stored_tensor import ITEM_BYTES
from lorakit.checkpoints.summary import kind_of_file
from lorakit.errors import ModelError

NOT_FINITE_CURE = "give an earlier save or another file; the run that made this one had failed"
"""What to do with a LoRA file that holds NaN or infinity."""
_AT_ONCE = 2**22
"""How many numbers are looked at together, which bounds the memory."""
_EXPONENTS: Mapping[str, int] = {
    "float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000,
    "float8_e5m2": 0x7C, "float8_e4m3fn": 0x7F, "float8_e8m0fnu": 0xFF,
}  # fmt: skip
"""The bits that all are set in NaN and infinity and in no other number, by PyTorch's name of the type."""
_TORCH_NAMES: Mapping[str, str] = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


@frozen
class _Numbers:
    """Numbers that lie one after the other in a file."""

    name: str
    dtype: str
    start: int
    count: int


def first_not_finite(path: Path) -> str:
    """The name of a tensor in a file that holds NaN or infinity; empty if all numbers are finite.

    All numbers are read. A `ModelError` if the file cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            return ""
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            stored = _in_safetensors(path) if kind_of_file(path) == "safetensors" else _in_pickle(path, content)
            return next((numbers.name for numbers in stored if not _is_finite(numbers, content)), "")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _in_safetensors(path: Path) -> Iterator[_Numbers]:
    for name, place in read_safetensors_header(path).places.items():
        if dtype := _TORCH_NAMES.get(place.dtype):
            yield _Numbers(name, dtype, place.start, (place.end - place.start) // ITEM_BYTES[dtype])


def _in_pickle(path: Path, content: mmap) -> Iterator[_Numbers]:
    for name, tensor in pickled_tensors(path).items():
        # Between the numbers of a view there are those of others.
        if tensor.dtype in _EXPONENTS and 0 < tensor.span <= math.prod(tensor.shape):
            yield _Numbers(name, tensor.dtype, tensor.record.start_in(content) + tensor.offset, tensor.span)


def _is_finite(numbers: _Numbers, content: mmap) -> bool:
    import numpy as np

    size, exponent = ITEM_BYTES[numbers.dtype], _EXPONENTS[numbers.dtype]
    for first in range(0, numbers.count, _AT_ONCE):
        count = min(_AT_ONCE, numbers.count - first)
        start = numbers.start + first * size
        # A copy, as views would keep the file from being closed.
        bits = np.frombuffer(content[start : start + count * size], f"<u{size}")
        if ((bits & bits.dtype.type(exponent)) == exponent).any():
            return False
    return True
