"""What is known of files without opening them: computed once, good until a file changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.data.captions import read_caption
from lorakit.data.images.decode import ImageFacts, inspect_image
from lorakit.data.images.perceptual_hash import perceptual_hash
from lorakit.errors import DataError, OutputError
from lorakit.utils.atomic_io import write_atomically
from lorakit.utils.safe_paths import require_regular_file

log = logging.getLogger(__name__)

_FORMAT = 1


class FileStatCache:
    """Remembers what was computed from files, such as sizes of images, by their path, length and time of change.

    Any number of threads may use one, and any number of runs the same file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._records = _read(file)
        self._new: dict[str, dict[str, Any]] = {}

    def digest(self, path: Path) -> str:
        """A key of the file's content. Raises DataError where it cannot be read."""
        return str(self.get_or_compute(path, "digest", lambda: content_digest(path)))

    def image(self, path: Path) -> ImageFacts:
        """What `inspect_image` finds. Raises DataError where it finds no image."""
        return ImageFacts(*self.get_or_compute(path, "image", lambda: list(inspect_image(path))))

    def caption(self, path: Path) -> str:
        """What `read_caption` reads. Raises DataError where it cannot."""
        return str(self.get_or_compute(path, "every line", lambda: read_caption(path)))

    def perceptual_hash(self, path: Path) -> str:
        """What `perceptual_hash` computes. Raises DataError where the image is damaged."""
        return str(self.get_or_compute(path, "perceptual hash", lambda: perceptual_hash(path)))

    def save(self) -> None:
        """Write what is new to the file, beside what other runs wrote there meanwhile; warn where that fails."""
        if self._new:
            self._records = _read(self._file) | self._new
            content = json.dumps({"format": _FORMAT, "files": self._records})
            try:
                write_atomically(self._file, content.encode())
            except OutputError as error:
                log.warning("%s Until then each run reads all images again.", error)
            self._new = {}

    def get_or_compute(self, path: Path, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, a JSON value, computed once per name for as long as the file stays the same."""
        key = os.path.abspath(path)  # noqa: PTH100 - `Path.resolve` would touch every folder on the way
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        stamp = [status.st_size, status.st_mtime_ns]
        record = self._new.get(key) or self._records.get(key)
        if record is None or record["stamp"] != stamp:
            record = {"stamp": stamp}
        if name not in record:
            record = {**record, name: compute()}
            self._new[key] = record
        return record[name]


def content_digest(path: Path) -> str:
    """A 128-bit key of a file's content. Raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The records in the file; none if it is absent, damaged or of another format."""
    try:
        require_regular_file(file)
        content = json.loads(file.read_bytes())
        if content["format"] != _FORMAT:
            return {}
        return {path: record for path, record in content["files"].items() if _is_record(record)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _is_record(record: Any) -> bool:
    """Whether this can be believed of a file, as far as it shows."""
    if not isinstance(record, dict) or "stamp" not in record:
        return False
    texts = [record.get(name, "") for name in ("digest", "every line")]
    if not re.fullmatch(r"[0-9a-f]{1,16}", str(record.get("perceptual hash", "0"))):
        return False
    match record.get("image", [1, 1, False, 0, 0]):
        case [int() as width, int() as height, bool(), int(), int()]:
            return min(width, height) > 0 and all(isinstance(text, str) for text in texts)
    return False
