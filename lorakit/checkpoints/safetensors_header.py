"""The header of a safetensors file, read by hand and believed only as far as the file bears it out.

The format: 8 bytes with the header's length (little-endian), the header in JSON, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError

LONGEST_HEADER = 100_000_000
"""Bytes of header that readers of the format accept."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_CURE = "download or convert it again"


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a safetensors file; a `ModelError` where header and file disagree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise ModelError(
                f"{path} is cut short or damaged: it says that its header has {length} bytes, but it has {size} bytes "
                f"in all; {_CURE}"
            )
        entries = _parsed(path, file.read(length))
    available = size - 8 - length
    try:
        ends = [_checked_end(name, entry, available) for name, entry in entries.items()]
    except ValueError as error:
        raise ModelError(f"{path} is cut short or damaged: {error}; {_CURE}") from None
    if max(ends, default=0) != available:
        raise ModelError(f"{path} is damaged: {available - max(ends, default=0)} bytes belong to no tensor; {_CURE}")
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def _parsed(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise ModelError(f"{path} is damaged: its header cannot be read; {_CURE}")
    entries.pop("__metadata__", None)
    return entries


def _checked_end(name: str, entry: Any, available: int) -> int:
    """Where a tensor's bytes end; a `ValueError` unless type, shape and place agree with each other and the file."""
    try:
        bits, shape, (start, end) = _BITS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers_are_sound = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        numbers_are_sound = False
    if not numbers_are_sound:
        raise ValueError(f"what it says of tensor {name!r} makes no sense")
    if end > available:
        raise ValueError(f"tensor {name!r} would end {end - available} bytes behind the end of the file")
    if (end - start) * 8 != math.prod(shape) * bits:
        raise ValueError(f"tensor {name!r} of shape {tuple(shape)} cannot have {end - start} bytes")
    return int(end)
