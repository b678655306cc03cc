"""The tensors in a PyTorch file (`.ckpt`, `.pt`, `.pth`, `.bin`), and where their numbers are; runs nothing of it.

Both formats are read: the zip archive, and the one before PyTorch 1.6, which is five pickles and then the numbers. No
number is read here, and what is described is never larger than what the file has.
"""

from __future__ import annotations

import io
import math
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.checkpoints.inert_pickle import Placeholder, read_inertly
from lorakit.checkpoints.stored_tensor import (
    ARCHIVE,
    ITEM_BYTES,
    Record,
    StoredTensor,
    Unreadable,
    cut,
    rebuild,
    resolve_storage,
)
from lorakit.errors import ModelError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_PICKLE = 16 * 2**20
"""Bytes; those of Stable Diffusion have less than one million."""
_LONGEST_NAME = 500
_MOST_REPETITION = 8
"""How many times the length of a file its tensors may have, as tensors can share numbers."""
_MOST_LISTED = 16
"""How many entries of a list are looked into."""
_LEVELS = ("state_dict", "model", "model_state_dict", "module")
"""Under which keys tools put the tensors one level down, the usual one first."""


def pickled_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a PyTorch file by name: those in it, or in its `state_dict`; what else it holds is ignored.

    A `ModelError` if a tensor can only be rebuilt by code, or if the file is damaged.
    """
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == ARCHIVE
        tensors = _chosen(_archived(path) if is_archive else _legacy_content(path))
        size = sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in tensors.values())
        if size > _MOST_REPETITION * path.stat().st_size:
            raise ValueError("its tensors are many times larger than the file")
    except _NeedsCodeError as needed:
        raise ModelError(
            f"{path} needs to run code {needed}, which lorakit refuses to do; "
            "convert it to .safetensors with a tool that you trust, or use a .safetensors file of it"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can lead to anything
        reason = cut(str(error)) or type(error).__name__
        raise ModelError(
            f"{path} is not a complete PyTorch checkpoint ({reason}); download or convert it again"
        ) from error
    return tensors


class _NeedsCodeError(Exception):
    """What the file holds would be made by a function or class that is not known."""

    def __init__(self, name: str, tensor: str = "") -> None:
        super().__init__(f"({cut(name)}) to load{' ' if tensor else ''}{cut(tensor)}")


def _chosen(content: object) -> dict[str, StoredTensor]:
    """The tensors of a file by name; raises the first error in any of them."""
    if isinstance(content, Placeholder | Unreadable):
        content = {"": content}
    content = _level_with_tensors(content) if isinstance(content, dict) else {}
    level = {name: value for name, value in content.items() if isinstance(name, str)}
    found = {}
    for name, value in level.items():
        if isinstance(value, StoredTensor) and name.isprintable():
            found[name] = value
        if isinstance(value, Unreadable):
            raise _NeedsCodeError(value.code, name) if value.code else ValueError(value.reason)
    for value in level.values():
        if not found and isinstance(value, Placeholder):
            raise _NeedsCodeError(value.name)
    return found


def _level_with_tensors(content: dict[Any, Any]) -> dict[Any, Any]:
    """The `state_dict` if there is one, else the dict with the most tensors: one of a known key, or the file's own.

    If none has any, it is what all dicts inside hold, by all keys: `string_to_param.*`, `768.0.linear.0.weight`.
    """
    inner: dict[Any, dict[Any, Any]] = {key: value for key, value in content.items() if isinstance(value, dict)}
    if state_dict := inner.get("state_dict"):
        return state_dict
    named = [inner[key] for key in (inner if len(content) == 1 else _LEVELS) if key in inner]
    own = {key: value for key, value in content.items() if key not in _LEVELS}
    level = max((*named, own), key=_count_of_tensors)
    if _count_of_tensors(level):
        return level
    listed = {key: value for key, value in content.items() if isinstance(value, list | tuple)}
    of_lists = {f"{key}.{at}": item for key, items in listed.items() for at, item in enumerate(items[:_MOST_LISTED])}
    inner |= {key: item for key, item in of_lists.items() if isinstance(item, dict)}
    once = {id(inside): (key, inside) for key, inside in inner.items()}
    return own | {
        f"{key}.{name}": value
        for key, inside in once.values()
        for name, value in inside.items()
        if len(str(key)) + len(str(name)) <= _LONGEST_NAME
    }


def _count_of_tensors(level: dict[Any, Any]) -> int:
    return sum(isinstance(value, StoredTensor | Unreadable) for key, value in level.items() if isinstance(key, str))


class _SmallReads(io.FileIO):
    """A file of which nothing large is read at once, such as a list of millions of entries."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _LARGEST_PICKLE:
            raise ValueError("the archive has a list of entries of an unusual length")
        return super().read(-1 if size is None else size) or b""


def _archived(path: Path) -> object:
    with _SmallReads(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # Archives that PyTorch did not write can be thousands of times larger in memory than on the disk.
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise ValueError("its content is compressed, which PyTorch never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its content is longer than the file")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("it has two entries of one name")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise ValueError("the archive has no data.pkl of a usual size")
        folder = pickles[0].filename.removesuffix("data.pkl")
        by_name = {entry.filename.removeprefix(folder): entry for entry in entries}
        if "byteorder" in by_name and archive.read(by_name["byteorder"])[:3] == b"big":
            raise ValueError("it has the other byte order (endianness)")

        def record_of(key: str, numbers: int, item_bytes: int) -> Record:
            entry = by_name.get(f"data/{key}")
            if entry is None or entry.file_size != numbers * item_bytes:
                raise ValueError(f"storage {cut(key)} does not have the {numbers} elements that it claims")
            return Record(numbers, item_bytes, entry.header_offset, is_archived=True)

        return read_inertly(io.BytesIO(archive.read(pickles[0])), rebuild, partial(resolve_storage, record_of))


def _legacy_content(path: Path) -> object:
    """The content of a file of PyTorch before 1.6: magic number, protocol, platform, content, keys, then the bytes."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(_LARGEST_PICKLE))
    records: dict[str, Record] = {}

    def record_of(key: str, numbers: int, item_bytes: int) -> Record:
        record = records.setdefault(key, Record(numbers, item_bytes))
        if (record.numbers, record.item_bytes) != (numbers, item_bytes):
            raise ValueError(f"storage {cut(key)} has two different lengths")
        return record

    read = partial(read_inertly, stream, rebuild, partial(resolve_storage, record_of))
    magic = read()
    if magic != _LEGACY_MAGIC:
        _chosen(magic)
        raise ValueError("it does not start as one")
    read(), read()
    content, keys = read(), read()
    place = stream.tell()
    if not isinstance(keys, list) or sorted(keys) != sorted(records):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        records[key].place = place
        place += 8 + records[key].length
    if place > path.stat().st_size:
        raise ValueError(f"it lacks {place - path.stat().st_size} bytes at its end")
    return content
