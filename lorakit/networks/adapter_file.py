"""Trained adapters as files: what is in one, how it is written whole, and how files of all kinds are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
from attrs import field, frozen
from torch import Tensor

from lorakit.checkpoints import pickled_tensors, summarize
from lorakit.checkpoints.lora_names import DOWN
from lorakit.checkpoints.safetensors_content import safetensors_content
from lorakit.errors import AdapterError, ModelError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.load import open_tensors
from lorakit.models.weights.lora_tensors import lora_tensors
from lorakit.utils.atomic_io import atomic_write

Precision = Literal["fp32", "fp16", "bf16"]
"""Number format of the weights in a file."""

DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""PyTorch's name of each."""
_RANKED = (f".{DOWN}", ".hada_w1_b", ".lokr_w1_b", ".lokr_w2_b")
"""Ends of the names of tensors that have as many rows as their adapter's rank."""
_WHOLE = ".lokr_w1"
"""End of the name of a matrix of LoKr, whose adapter has no rank unless the other matrix has one."""
_LEGACY_HASHED = slice(0x100000, 0x110000)


@frozen
class AdapterFile:
    """What is in a LoRA file."""

    tensors: Mapping[str, Tensor]
    """By name in the file: `lora_unet_….lora_down.weight`, `….lora_up.weight`, `….alpha`."""
    metadata: Mapping[str, str] = field(factory=dict)
    """What it says about itself: `ss_network_dim`, …; empty for formats that hold none."""


class Saver(Protocol):
    """Writes and reads a file format."""

    @property
    def suffix(self) -> str:
        """Of its files, with the dot: `.safetensors`."""

    def save(self, adapter: AdapterFile, path: Path) -> None:
        """Write a file, whole or not at all. Raises `OutputError` where the system refuses."""

    def load(self, path: Path) -> AdapterFile:
        """Read a file. Raises `AdapterError` if it is missing or broken."""


@frozen
class SafetensorsSaver:
    """The format that all tools read, with metadata and the two hashes that web UIs know files by."""

    precision: Precision
    suffix: str = ".safetensors"

    def save(self, adapter: AdapterFile, path: Path) -> None:
        """Write tensors and metadata, and `sshs_model_hash` and `sshs_legacy_hash`."""
        write_safetensors(path, _in_precision(adapter.tensors, self.precision), adapter.metadata)

    def load(self, path: Path) -> AdapterFile:
        """Read tensors and metadata."""
        return read_adapter(path)


@frozen
class TorchSaver:
    """A pickled dict of tensors, which older tools read; holds no metadata."""

    precision: Precision
    suffix: str

    def save(self, adapter: AdapterFile, path: Path) -> None:
        """Write the tensors; the metadata is left out."""
        buffer = BytesIO()
        torch.save(_in_precision(adapter.tensors, self.precision), buffer)
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())

    def load(self, path: Path) -> AdapterFile:
        """Read the tensors, and run no code that the file may hold."""
        return read_adapter(path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as they are, metadata, and both hashes. Raises `OutputError` where the system refuses."""
    header, body = _safetensors(tensors, metadata)
    with atomic_write(path) as file:
        file.write(header)
        file.write(body)


def read_adapter(path: Path) -> AdapterFile:
    """The LoRA file at a path: `.safetensors`, or `.ckpt`, `.pt` and the like, of which no code is run.

    Raises `AdapterError` if it is missing, broken or holds anything but tensors.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file. Check the path.")
    try:
        if summarize(path).kind == "safetensors":
            return AdapterFile(*safetensors_content(path))
        names, read = pickled_tensors(path), open_tensors(path)
        if not names:
            raise AdapterError(f"{path} is no LoRA file: it holds no dict of tensors by name. Choose another file.")
        # Copies, so that the file may be replaced while they are in use.
        return AdapterFile({name: read(name).clone() for name in names})
    except ModelError as error:
        raise AdapterError(f"{error}.") from error
    except AdapterError:
        raise
    except Exception as error:  # the readers raise all kinds of exceptions for damaged files
        raise AdapterError(f"{path} is broken: {error}. Download or save it again.") from error


def load_initial_weights(path: Path, targets: Sequence[AdaptationTarget] = ()) -> dict[str, Tensor]:
    """The tensors of a LoRA file of any tool to continue from, by the names that sd-scripts has for them.

    `targets` are the model's layers: their tensors are found by any name that a layer has, and adapters of fused layers
    are split among them. Alphas that the file lacks are there, too: those of PEFT's config, or else, as all tools do,
    those of scale 1. Raises `AdapterError` as `read_adapter` does.
    """
    found = read_adapter(path).tensors
    names = lora_tensors(summarize(path), targets)
    tensors = {own: names.read(own, found.__getitem__) for own in names.stored}
    for own, down in list(tensors.items()):
        if down.is_complex() or not down.float().isfinite().all():
            name = names.name(own)
            raise AdapterError(f"{path} cannot be trained on: {name} holds NaN, infinity or complex numbers.")
    for layer, rank in _ranks(tensors).items():
        tensors.setdefault(f"{layer}.alpha", torch.tensor(names.alphas.get(layer, float(rank))))
    return tensors


def ranks_and_alphas(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each adapter in a file's tensors, by the key of its layer; its rank for an alpha of 0."""
    ranks = _ranks(tensors)
    alphas = {key: tensors.get(f"{key}.alpha") for key in ranks}
    return {
        key: (rank, float(alpha) or float(rank))
        for key, rank in ranks.items()
        if rank and (alpha := alphas[key]) is not None and alpha.numel() == 1
    }


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of each adapter by the key of its layer; 1 for one without a rank."""
    ranks = {key.partition(".")[0]: 1 for key in tensors if key.endswith(_WHOLE)}
    for key, tensor in tensors.items():
        if key.endswith(_RANKED) and tensor.ndim:
            ranks[key.partition(".")[0]] = len(tensor)
    return ranks


def _in_precision(tensors: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    return {key: tensor.to(DTYPES[precision]).contiguous() for key, tensor in tensors.items()}


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
    """Header and body of a safetensors file with the hashes in its metadata.

    `sshs_model_hash` is the SHA-256 of the body. `sshs_legacy_hash` begins that of 64 KiB from 1 MiB on, of the file
    as it would be with only the `ss_*` metadata; for shorter files, of nothing.
    """
    ss_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    plain = memoryview(safetensors.torch.save(dict(tensors), ss_metadata))
    body_start = 8 + int.from_bytes(plain[:8], "little")
    body = plain[body_start:]
    hashes = {
        "sshs_model_hash": sha256(body).hexdigest(),
        "sshs_legacy_hash": sha256(plain[_LEGACY_HASHED]).hexdigest()[:8],
    }
    header: dict[str, Any] = json.loads(bytes(plain[8:body_start]))
    header["__metadata__"] = {**metadata, **hashes}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, body
