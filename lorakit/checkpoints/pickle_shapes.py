"""Names and shapes of the tensors in a `.ckpt` file, read without running anything that the file asks for.

A PyTorch checkpoint is a pickle: a program for a stack machine that may call any Python function. Here it
may call only what rebuilds tensors, and those names stand for functions that note a shape and do nothing else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from attrs import frozen

from lorakit.errors import ModelError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_PICKLE = 256 * 2**20


@frozen
class _Noted:
    """The shape of a tensor that was not built."""

    shape: tuple[int, ...]


def _note_tensor(_storage: object, _offset: int, size: tuple[int, ...], *_rest: object) -> _Noted:
    return _Noted(tuple(size))


def _note_parameter(data: object, *_rest: object) -> object:
    return data


_INERT: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *name: name,
    ("torch._utils", "_rebuild_tensor"): _note_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _note_tensor,
    ("torch._utils", "_rebuild_parameter"): _note_parameter,
}
_NUMBER_FORMATS = {
    "float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool",
    "HalfStorage", "BFloat16Storage", "FloatStorage", "DoubleStorage", "CharStorage", "ByteStorage",
    "ShortStorage", "IntStorage", "LongStorage", "BoolStorage",
}  # fmt: skip


class _NeedsCodeError(Exception):
    """The pickle names something that is not part of rebuilding tensors."""


class _ShapeReader(pickle.Unpickler):
    """An unpickler for which tensors are shapes and every unknown name is a refusal."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INERT:
            return _INERT[module, name]
        if module in {"torch", "torch.storage"} and name in _NUMBER_FORMATS | {"UntypedStorage", "TypedStorage"}:
            return name
        raise _NeedsCodeError(f"{module}.{name}")

    def persistent_load(self, pid: object) -> None:
        """Where a tensor's bytes are, which nobody here needs to know."""


def pickle_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a `.ckpt` file or of the `state_dict` in it; never runs the file's code."""
    try:
        content = _content(path)
    except _NeedsCodeError as needed:
        raise ModelError(
            f"{path} needs to run code ({needed}) to load, which lorakit refuses to do; "
            "convert it to .safetensors with a tool that you trust, or use a .safetensors file of the model"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise ModelError(f"{path} is not a whole PyTorch checkpoint ({error}); download or convert it again") from error
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    if not isinstance(tensors, Mapping):
        return {}
    return {str(name): value.shape for name, value in tensors.items() if isinstance(value, _Noted)}


def _content(path: Path) -> object:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return _legacy_content(file)
    with zipfile.ZipFile(path) as archive:
        member = next((entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")), None)
        if member is None or member.file_size > _LARGEST_PICKLE:
            raise ValueError("the archive has no data.pkl of a usual size")
        with archive.open(member) as file:
            return _ShapeReader(file).load()


def _legacy_content(file: IO[bytes]) -> object:
    """The content of a file of PyTorch before 1.6: magic number, protocol, platform, content, then the bytes."""
    if _ShapeReader(file).load() != _LEGACY_MAGIC:
        raise ValueError("it does not start as one")
    _ShapeReader(file).load()
    _ShapeReader(file).load()
    content: object = _ShapeReader(file).load()
    return content
