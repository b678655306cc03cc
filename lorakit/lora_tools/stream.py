"""Writing a safetensors file tensor by tensor, so that one at a time is in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from lorakit.checkpoints import Shapes, pickled_tensors
from lorakit.checkpoints.safetensors_header import read_safetensors_header
from lorakit.checkpoints.stored_tensor import ITEM_BYTES
from lorakit.errors import ModelError
from lorakit.models.weights.folders import WEIGHT_SUFFIXES
from lorakit.models.weights.hashing import hash_of_file
from lorakit.utils.safe_paths import require_regular_file

_DTYPES: Mapping[str, str] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64",
}  # fmt: skip
"""What safetensors calls the number formats of PyTorch."""
_BYTES = {name: ITEM_BYTES[dtype] for dtype, name in _DTYPES.items()}


@frozen
class Layout:
    """The tensors of a file in the order in which they are written."""

    shapes: Shapes
    """Shape of each."""
    dtypes: Mapping[str, str]
    """Number format of each, as safetensors calls it."""

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The header of a safetensors file, its length in front."""
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, shape in self.shapes.items():
            start, end = end, end + torch.Size(shape).numel() * _BYTES[self.dtypes[name]]
            entries[name] = {"dtype": self.dtypes[name], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def layout_of(path: Path, kind: str) -> Layout:
    """The tensors of a safetensors or PyTorch file in a good order: that of the file, or large numbers first."""
    if kind == "safetensors":
        header = read_safetensors_header(path)
        order = sorted(header.places, key=lambda name: header.places[name].start)
        return Layout(
            {name: header.shapes[name] for name in order}, {name: header.places[name].dtype for name in order}
        )
    tensors = pickled_tensors(path)
    strange = next((name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES), "")
    if strange:
        raise ModelError(f"{path}: {strange} has numbers of the type {tensors[strange].dtype}, which safetensors lacks")
    # Readers map numbers into memory where they lie, and want them at multiples of their size.
    order = sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name].dtype])
    return Layout({name: tensors[name].shape for name in order}, {name: _DTYPES[tensors[name].dtype] for name in order})


def write_stream(path: Path, layout: Layout, metadata: Mapping[str, str], tensor: Callable[[str], Tensor]) -> bool:
    """Write a file whose tensors are asked for one after the other; whether it is read back as it was written."""
    digest = sha256()
    with path.open("wb") as file:

        def write(content: bytes | memoryview) -> None:
            digest.update(content)
            file.write(content)

        write(layout.header(metadata))
        for name in layout.shapes:
            write(_bytes(tensor(name)))
    return hash_of_file(path) == digest.hexdigest() and read_safetensors_header(path).shapes == dict(layout.shapes)


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.contiguous()
    view: memoryview = plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")
    return view


def copy_folder(source: Path, target: Path, changed: Iterable[Path]) -> None:
    """Copy a diffusers folder without the weights of some parts; `changed` are their files, or the indexes of those.

    What else is there of their weights, for other programs or in other precisions, would no longer be the same model.
    Weights beside the folders of the parts are other models.
    """
    indexes = set(changed)
    unlike = {source, *(index.parent for index in indexes)}
    for root, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        folder = target / Path(root).relative_to(source)
        folder.mkdir()
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            is_weights = path.suffix in WEIGHT_SUFFIXES or ".index." in path.name
            is_index = path in indexes and path.suffix == ".json"
            if is_index or not (is_weights and path.parent in unlike):
                require_regular_file(path)
                shutil.copyfile(path, folder / path.name)
