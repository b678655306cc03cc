"""Tensors and storages of PyTorch's pickles, as descriptions of where their numbers are in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from mmap import mmap
from typing import Any

from attrs import define, frozen

from lorakit.checkpoints.inert_pickle import Parameters, Placeholder

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex32": 4, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""Bytes of a number, by PyTorch's name of its type."""
_QUANTIZED = {"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
"""The same of types that are not read."""
_STORAGES = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32", "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4", "UntypedStorage": "uint8",
}  # fmt: skip
ARCHIVE = b"PK\3\4"
"""How a zip archive starts, and the header of each entry in it."""
_MOST_DIMENSIONS = 64
_MOST_ARGUMENTS = 16
_LONGEST_KEY = 100


@define(eq=False)
class Record:
    """The bytes of a storage, as they lie in a file."""

    numbers: int
    item_bytes: int
    place: int = -1
    """Where the file has their header."""
    is_archived: bool = False
    """Whether that is the header of an archive's entry; before PyTorch 1.6 it is a count of numbers."""

    @property
    def length(self) -> int:
        """How many bytes there are."""
        return self.numbers * self.item_bytes

    def start_in(self, content: mmap | bytes) -> int:
        """Where the bytes start in the file with this content; a `ValueError` if it has something else there."""
        if self.is_archived:
            header = content[self.place : self.place + 30]
            start = self.place + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            is_sound = header[:4] == ARCHIVE
        else:
            start = self.place + 8
            is_sound = int.from_bytes(content[self.place : start], "little") == self.numbers
        if not is_sound or start + self.length > len(content):
            raise ValueError("the data of a tensor is not where the file says")
        return start


@frozen
class StoredTensor:
    """A tensor that was not read."""

    dtype: str
    """Type of its numbers, as PyTorch calls it: `float16`."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """How many numbers lie from one index to the next, by dimension."""
    record: Record
    offset: int
    """Bytes from the start of the record to the first number."""

    @property
    def span(self) -> int:
        """How many numbers there are from the first to the last, with those in between that are not the tensor's."""
        return span_of(self.shape, self.strides)


def span_of(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many numbers a tensor reaches over; 0 if it has none."""
    return 0 if 0 in shape else 1 + sum((side - 1) * step for side, step in zip(shape, strides, strict=True))


@frozen
class Storage:
    """The bytes that tensors are views of: a record, or a part of one."""

    dtype: str
    record: Record
    first: int
    """How many bytes of the record are in front."""
    length: int


@frozen
class Unreadable:
    """Stands for a tensor or storage that cannot be read, which matters only if it is wanted."""

    reason: str = ""
    code: str = ""
    """The function or class that would make it, if that is the reason."""


def rebuild(name: str, arguments: tuple[Any, ...]) -> object:
    """The stand-in for the result of a call: a described tensor, a dict, or a placeholder."""
    if name in _KNOWN and len(arguments) <= _MOST_ARGUMENTS:
        try:
            return _KNOWN[name](*arguments)
        except (TypeError, ValueError) as error:
            return Unreadable(str(error))
    first = arguments[:_MOST_ARGUMENTS]
    inner = [part for item in first if isinstance(item, tuple | list) for part in item[:_MOST_ARGUMENTS]]
    makes_tensors = name.startswith(("torch._utils.", "torch._tensor.", "torch.storage."))
    if makes_tensors or any(isinstance(part, StoredTensor | Storage | Unreadable) for part in (*first, *inner)):
        return Unreadable(code=name)
    return Placeholder(name, is_object=True)


def _tensor(storage: Any, offset: Any, size: Any, strides: Any, *options: Any) -> object:
    """A tensor of its storage's type; the third of the options has marks of numbers that are stored as others."""
    return _view(storage, getattr(storage, "dtype", ""), (offset, size, strides), options[2:3])


def _typed_tensor(*arguments: Any) -> object:
    """A tensor of a storage of bytes, with its type."""
    storage, offset, size, strides, _needs_gradient, _hooks, dtype, *marks = arguments
    return _view(storage, dtype.name.removeprefix("torch."), (offset, size, strides), marks)


def _view(storage: object, dtype: str, place: tuple[Any, Any, Any], marks: Sequence[Any]) -> object:
    """A tensor; raises ValueError where its storage has not the numbers that it would have."""
    if not isinstance(storage, Storage) or dtype not in ITEM_BYTES:
        if isinstance(storage, Placeholder):
            return Unreadable(code=storage.name)
        return storage if isinstance(storage, Unreadable) else Unreadable("a tensor has no data")
    if any(marks):
        raise ValueError("a tensor is stored negated or conjugated")
    offset, size, strides = place
    if not len(size) == len(strides) <= _MOST_DIMENSIONS or not all(map(_is_size, (offset, *size, *strides))):
        raise ValueError("a tensor has an invalid shape")
    item_bytes, shape = ITEM_BYTES[dtype], tuple(size)
    if (offset + span_of(shape, strides)) * item_bytes > storage.length:
        raise ValueError(f"a tensor of shape {shape} has {storage.length // item_bytes} numbers only")
    return StoredTensor(dtype, shape, tuple(strides), storage.record, storage.first + offset * item_bytes)


def _parameter(data: object, *_options: object) -> object:
    return Unreadable(code=data.name) if isinstance(data, Placeholder) else data


def _of_type(function: Any, kind: Any, arguments: Any, _attributes: object) -> object:
    """A tensor with attributes, if it is one of PyTorch's own classes."""
    if kind.name in {"torch.Tensor", "torch.nn.parameter.Parameter"}:
        return rebuild(function.name, arguments)
    return Unreadable(code=kind.name)


_KNOWN: Mapping[str, Callable[..., object]] = {
    "collections.OrderedDict": lambda *content: (
        Placeholder("collections.OrderedDict", is_object=True) if content else {}
    ),
    "collections.defaultdict": lambda *_: {},
    "torch.nn.modules.container.ParameterDict": lambda *_: Parameters(),
    "torch.Size": lambda sides: sides,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}


RecordOf = Callable[[str, int, int], Record]
"""The record with that key, by element count and size in bytes. Raises ValueError if there is no such record."""


def resolve_storage(record_of: RecordOf, persistent_id: Any) -> object:
    """The stand-in for the storage, or module source, that is stored outside the pickle under an id."""
    if len(persistent_id) > _MOST_ARGUMENTS:
        raise ValueError("a storage has an invalid length")
    if persistent_id[0] == "module":
        return Placeholder(persistent_id[1].name)
    _, kind, key, _device, numbers, *part = persistent_id
    dtype = _STORAGES.get(kind.name.rpartition(".")[2])
    if dtype is None:
        return Unreadable(f"numbers of the type {kind.name} cannot be read")
    if type(key) is not str or len(key) > _LONGEST_KEY or not _is_size(numbers):
        raise ValueError("a storage has an invalid length")
    item_bytes = ITEM_BYTES.get(dtype) or _QUANTIZED[dtype]
    try:
        record = record_of(key, numbers, item_bytes)
    except ValueError as error:
        return Unreadable(str(error))
    _, first, count = part[0] if part and part[0] else (None, 0, numbers)
    if not _is_size(first) or not _is_size(count) or first + count > numbers:
        raise ValueError("a part of a storage is not in it")
    return Storage(dtype, record, first * item_bytes, count * item_bytes)


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def cut(text: str) -> str:
    """A text of a file as it is shown in messages, which it must not fill or garble."""
    start = text[:201]
    start = start if start.isprintable() else ascii(start)
    return start if len(start) <= 200 else f"{start[:199]}…"
