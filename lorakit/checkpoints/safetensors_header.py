"""The header of a safetensors file, read by hand and believed only as far as the file bears it out.

The format: 8 bytes with the header's length (little-endian), the header in JSON, the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.errors import ModelError

LONGEST_HEADER = 32 * 2**20
"""Bytes of header that are read; the longest of models have less than a million, and a byte may take 30 in memory."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_CURE = "download or convert it again"


@frozen
class TensorPlace:
    """Where the numbers of a tensor are in a file."""

    dtype: str
    """Type of the numbers, as safetensors calls it: `F16`."""
    start: int
    end: int


@frozen
class SafetensorsHeader:
    """What the header of a safetensors file says."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor, by name."""
    metadata: Mapping[str, str]
    """Texts that describe the file, by key."""
    places: Mapping[str, TensorPlace]
    """Where the numbers of each tensor are, by name."""


def safetensors_shapes(path: Path) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of each tensor in a safetensors file; a `ModelError` where header and file disagree."""
    return read_safetensors_header(path).shapes


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file; a `ModelError` where header and file disagree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise ModelError(
                f"{path} is cut short or damaged: it says that its header has {length} bytes, but it has {size} bytes "
                f"in all; {_CURE}"
            )
        entries, metadata = _parsed(path, file.read(length))
    available, end = size - 8 - length, 0
    try:
        for start, next_end, name in sorted(_checked_place(name, entry, available) for name, entry in entries.items()):
            if start < end:
                raise ValueError(f"tensor {_cut(name)} shares bytes with another")
            if start > end:
                raise ValueError(f"{start - end} bytes in front of tensor {_cut(name)} belong to no tensor")
            end = next_end
    except ValueError as error:
        raise ModelError(f"{path} is cut short or damaged: {error}; {_CURE}") from None
    if end != available:
        raise ModelError(f"{path} is damaged: {available - end} bytes belong to no tensor; {_CURE}")
    body = 8 + length
    places = {
        name: TensorPlace(entry["dtype"], *(body + offset for offset in entry["data_offsets"]))
        for name, entry in entries.items()
    }
    return SafetensorsHeader({name: tuple(entry["shape"]) for name, entry in entries.items()}, metadata, places)


def _parsed(path: Path, header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of the tensors, and the texts that describe the file."""
    try:
        entries = json.loads(header, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise ModelError(f"{path} is damaged: its header cannot be read; {_CURE}")
    metadata = entries.pop("__metadata__", None)
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return entries, {key: text for key, text in texts if isinstance(text, str)}


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError where a name is in it twice, of which readers take the one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _checked_place(name: str, entry: Any, available: int) -> tuple[int, int, str]:
    """A tensor's start and end; a `ValueError` unless type, shape and place agree with each other and the file."""
    try:
        bits, shape, (start, end) = _BITS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, end)
        is_sound = type(shape) is list and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound or end < start:
        raise ValueError(f"the entry of tensor {_cut(name)} is invalid")
    if end > available:
        raise ValueError(f"tensor {_cut(name)} would end {end - available} bytes after the end of the file")
    count = int(0 not in shape)
    for side in shape if count else ():
        count = min(count * side, available * 8 + 1)  # bounds the computation
    if (end - start) * 8 != count * bits:
        raise ValueError(f"tensor {_cut(name)} of shape {_cut(tuple(shape))} cannot have {end - start} bytes")
    return start, end, name


def _cut(value: object) -> str:
    """A name or shape as it is shown in messages, which a file must not fill."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
