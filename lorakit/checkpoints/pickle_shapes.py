"""Names and shapes of the tensors in a `.ckpt` file, read without running anything that the file asks for.

A PyTorch checkpoint is a pickle: a program for a stack machine that may call any Python function. Here it
may call only what rebuilds tensors, and those names stand for functions that note a shape and do nothing else.
A file that passes is no larger in memory than on the disk, so that it may be given to PyTorch's own reader.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

from attrs import frozen

from lorakit.errors import ModelError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_PICKLE = 16 * 2**20
"""Bytes; those of Stable Diffusion have less than one million."""
_MOST_DIMENSIONS = 64
_MOST_ITEMS = 10_000
_ITEM_BYTES = {
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8,
    "bool": 1, "HalfStorage": 2, "BFloat16Storage": 2, "FloatStorage": 4, "DoubleStorage": 8, "CharStorage": 1,
    "ByteStorage": 1, "ShortStorage": 2, "IntStorage": 4, "LongStorage": 8, "BoolStorage": 1, "UntypedStorage": 1,
}  # fmt: skip


@frozen
class _Noted:
    """The shape of a tensor that was not built."""

    shape: tuple[int, ...]


class _NeedsCodeError(Exception):
    """The pickle names something that is not part of rebuilding tensors."""


def _note_tensor(storage: object, offset: int, size: Any, stride: Any, *_rest: object) -> _Noted:
    """Raises ValueError where the numbers of the storage, of which there are `storage`, are not enough."""
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise ValueError("a tensor has no shape that makes sense")
    sound = all(type(number) is int and 0 <= number < 2**63 for number in (storage, offset, *size, *stride))
    if not sound or not isinstance(storage, int):
        raise ValueError("a tensor has no shape that makes sense")
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= storage or math.prod(size) > storage):
        raise ValueError(f"a tensor of shape {tuple(size)} has {storage} numbers only")
    return _Noted(tuple(size))


def _note_parameter(data: object, *_rest: object) -> object:
    return data


def _note_nothing(*_arguments: object) -> None:
    """What stands for things that tell of no tensor."""


def _note_set(items: Any = ()) -> None:
    if len(set(items)) > _MOST_ITEMS:
        raise ValueError("it has a set of very many things")


def _empty_dict(*content: object) -> OrderedDict[object, object]:
    if content:
        raise ValueError("a dict comes with its content, as PyTorch never writes it")
    return OrderedDict()


_INERT: Mapping[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): _empty_dict,
    ("builtins", "set"): _note_set,
    ("__builtin__", "set"): _note_set,
    ("torch", "Size"): _note_nothing,
    ("torch", "device"): _note_nothing,
    ("torch._utils", "_rebuild_tensor"): _note_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _note_tensor,
    ("torch._utils", "_rebuild_parameter"): _note_parameter,
}


def _drop_attributes(reader: Any) -> None:
    """In place of what sets attributes; only dicts may have some."""
    reader.stack.pop()
    if not isinstance(reader.stack[-1], OrderedDict):
        raise ValueError("it changes what it has made, as PyTorch never does")


def _as_list(count: int) -> Callable[[Any], None]:
    def put_together(reader: Any) -> None:
        reader.stack[-count:] = [reader.stack[-count:]]

    return put_together


_INSTRUCTIONS = {
    **pickle._Unpickler.dispatch,
    pickle.BUILD[0]: _drop_attributes,
    # To find tuples of tuples of tuples in a dict can take forever; lists are refused there, and do elsewhere.
    pickle.TUPLE[0]: pickle._Unpickler.dispatch[pickle.LIST[0]],
    pickle.EMPTY_TUPLE[0]: pickle._Unpickler.dispatch[pickle.EMPTY_LIST[0]],
    pickle.TUPLE1[0]: _as_list(1),
    pickle.TUPLE2[0]: _as_list(2),
    pickle.TUPLE3[0]: _as_list(3),
}
# It makes room for as much as the file says.
del _INSTRUCTIONS[pickle.BYTEARRAY8[0]]


class _ShapeReader(pickle._Unpickler):
    """An unpickler for which tensors are shapes and every unknown name is a refusal.

    It is the one in Python, because that in C makes room for as much as the file says in other places too.
    """

    dispatch: ClassVar = _INSTRUCTIONS

    def __init__(self, content: bytes | BytesIO, records: Mapping[str, int] | None = None) -> None:
        """`records` has the bytes that there are of each storage by its key; None where that is not known."""
        super().__init__(BytesIO(content) if isinstance(content, bytes) else content)
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INERT:
            return _INERT[module, name]
        if module in {"torch", "torch.storage"} and name in _ITEM_BYTES:
            return name
        raise _NeedsCodeError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> int:
        """How many numbers a storage has; its bytes are not read."""
        _, kind, key, _, count, *_ = pid
        if type(count) is not int or count < 0:
            raise ValueError("a storage has no length that makes sense")
        if self._records is not None and self._records.get(key) != count * _ITEM_BYTES[kind]:
            raise ValueError(f"storage {key} is said to have {count} numbers, and has not")
        return count


def pickle_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a `.ckpt` file or of the `state_dict` in it; never runs the file's code.

    A `ModelError` where the file needs code, is damaged, or would take more memory than it is long.
    """
    try:
        content = _archived(path) if zipfile.is_zipfile(path) else _legacy_content(path)
    except _NeedsCodeError as needed:
        raise ModelError(
            f"{path} needs to run code ({needed}) to load, which lorakit refuses to do; "
            "convert it to .safetensors with a tool that you trust, or use a .safetensors file of it"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        reason = str(error) or type(error).__name__
        raise ModelError(
            f"{path} is not a whole PyTorch checkpoint ({reason}); download or convert it again"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    if not isinstance(tensors, Mapping):
        return {}
    return {name: value.shape for name, value in tensors.items() if isinstance(name, str) and isinstance(value, _Noted)}


def _refuse_inflation(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise ValueError for an archive that is not as PyTorch writes them: nothing in it packed, shared or named twice.

    Other archives can be thousands of times larger in memory than on the disk.
    """
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its content is compressed, which PyTorch never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its content is longer than the file")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("it has two entries of one name")


def _archived(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        _refuse_inflation(archive, path)
        members = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(members) != 1 or members[0].file_size > _LARGEST_PICKLE:
            raise ValueError("the archive has no data.pkl of a usual size")
        folder = members[0].filename.removesuffix("data.pkl") + "data/"
        records = {
            entry.filename.removeprefix(folder): entry.file_size
            for entry in archive.infolist()
            if entry.filename.startswith(folder)
        }
        return _ShapeReader(archive.read(members[0]), records).load()


def _legacy_content(path: Path) -> object:
    """The content of a file of PyTorch before 1.6: magic number, protocol, platform, content, keys, then the bytes."""
    with path.open("rb") as file:
        start = BytesIO(file.read(_LARGEST_PICKLE))
    if _ShapeReader(start).load() != _LEGACY_MAGIC:
        raise ValueError("it does not start as one")
    _ShapeReader(start).load()
    _ShapeReader(start).load()
    content: object = _ShapeReader(start).load()
    _ShapeReader(start).load()
    return content
