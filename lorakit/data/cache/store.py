"""The cache of encoded images and captions: tensors found by a key of all that they were made from.

A key says everything about its entry, so an entry never goes stale, and any number of runs and
processes may share a folder. Imports torch when tensors are first read or written.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.data.cache.file_cache import FileStatCache
from lorakit.errors import DataError, OutputError, Problem
from lorakit.utils.atomic_io import write_atomically
from lorakit.utils.safe_paths import require_regular_file

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def content_key(*parts: object) -> str:
    """A 160-bit key, in hexadecimal, of the parts' texts."""
    return blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


class NotFiniteError(ValueError):
    """Tensors with NaN or infinity, which are never stored."""


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NotFiniteError where a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NotFiniteError(f"its {name} holds NaN or infinity")


def to_storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of an entry's tensors as they are to be written. Raises NotFiniteError."""
    from torch import contiguous_format

    check_finite(tensors)
    # A row of a batch would be written with the layout, and the memory, of the whole.
    return {name: tensor.detach().cpu().clone(memory_format=contiguous_format) for name, tensor in tensors.items()}


class Cache:
    """A folder of tensors: one safetensors file for each key, in sub-folders named by the key's first two digits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memo = FileStatCache(folder / "files.json")
        """What is known of images, captions and entries without opening their files."""
        self._unwritten: dict[str, dict[str, Tensor]] = {}

    def has(self, key: str) -> bool:
        """Whether there is a whole entry; a damaged one counts as absent."""
        if key in self._unwritten:
            return True
        path = self.path(key)
        try:
            return bool(self.memo.get_or_compute(path, "whole", lambda: _is_whole(path)))
        except DataError:
            return False

    def load(self, key: str, names: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU. Raises DataError where it is absent or damaged, or lacks a name."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        if key in self._unwritten:
            return dict(self._unwritten[key])
        path = self.path(key)
        try:
            require_regular_file(path)
            entry = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            hint = "start again: entries missing from the cache are encoded again"
            raise DataError(str(Problem(str(path), "was removed or damaged while it was in use", hint))) from error
        if not entry.keys() >= set(names):
            raise DataError(str(Problem(str(path), f"does not hold {' and '.join(names)}", "remove this file")))
        return entry

    def write(self, key: str, entry: Mapping[str, Tensor], *, keep_unwritten: bool = False) -> None:
        """Write an entry made by `to_storable`, which computes nothing.

        One that the disk does not take is kept in memory if `keep_unwritten`; else OutputError is raised.
        """
        from safetensors.torch import save

        try:
            write_atomically(self.path(key), save(dict(entry)))
        except OutputError as error:
            if not keep_unwritten:
                raise
            if not self._unwritten:
                log.warning("%s Until then what is encoded is kept in memory, for this run alone.", error)
            self._unwritten[key] = dict(entry)
        else:
            self.memo.get_or_compute(self.path(key), "whole", lambda: True)

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.folder / key[:2] / f"{key}.safetensors"


def _is_whole(path: Path) -> bool:
    """Whether a file has all the bytes that its header tells of."""
    from safetensors import SafetensorError, safe_open

    try:
        require_regular_file(path)
        with safe_open(path, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False
