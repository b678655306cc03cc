"""Hashes of weights and of whole files, taken once and remembered for as long as the file does not change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from lorakit.models.interfaces import Memo
from lorakit.models.weights.folders import TensorRef
from lorakit.models.weights.load import open_tensors


class ProcessMemo:
    """Remembers until the process ends."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, str], str] = {}

    def get_or_compute(self, path: Path, name: str, compute: Callable[[], str]) -> str:
        """What `compute` returns, computed once per name for as long as the file's size and time stay the same."""
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns, name)
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def hash_of_weights(file: Path | Sequence[Path], names: Mapping[str, TensorRef]) -> str:
    """SHA-256 over number format, shape and bytes of the named tensors of a file; reads no others.

    `names` has each tensor's place in the file; its keys are hashed. Tensors that are spread over several files give
    the same as in one.
    """
    read, digest = open_tensors(file), hashlib.sha256()
    for name in sorted(names):
        tensor = read(names[name])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hashes_in_folders(folders: Sequence[Path], names: Sequence[str], memo: Memo) -> str:
    """SHA-256 of those of the named files that are in the folders, cached in `memo`; empty if there are none."""
    files = [file for folder in folders for name in names if (file := folder / name).is_file()]
    return " ".join(memo.get_or_compute(file, "sha256", partial(hash_of_file, file)) for file in files)


def hash_of_file(file: Path) -> str:
    """SHA-256 of a whole file, which web UIs look models up by."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def short_hash_of_file(file: Path) -> str:
    """First 8 digits of the SHA-256 of 64 KiB at 1 MiB: the older hash that web UIs look models up by."""
    with file.open("rb") as stream:
        stream.seek(0x100000)
        return hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]
