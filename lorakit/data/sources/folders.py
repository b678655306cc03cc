"""Folders of images with a caption file each; opens none of the files and imports no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

from lorakit.api.dataset_source import SourceImage
from lorakit.config.datasets import SubsetConfig
from lorakit.data.captions import by_lower_extension, extension_problem, find_caption
from lorakit.data.images.formats import EXTENSIONS, NAMES, UNREAD, extension_of
from lorakit.data.sources.metadata_files import METADATA_FILES
from lorakit.errors import DataError, Problem
from lorakit.utils.safe_paths import list_files
from lorakit.utils.wording import some

_DEEP = 2
_MOST_FOLDERS = 200
"""How deep images are searched for, and in how many folders, for a message only."""


@frozen
class FolderSource:
    """The images in the `image_dir` of a subset, sorted by name, each with its caption file."""

    subset: SubsetConfig

    def list_images(self, problems: list[str]) -> Iterator[SourceImage]:  # noqa: ARG002
        """The images. Raises DataError where there are none, or no file can be a caption."""
        folder = self.subset.image_dir
        extension = self.subset.caption_extension
        if extension is not None and (problem := extension_problem(extension)):
            raise DataError(str(Problem("caption_extension", problem, "leave it out for .txt and .caption")))
        try:
            names = sorted(list_files(folder))
        except OSError as error:
            message = f"cannot be listed: {error.strerror}"
            raise DataError(str(Problem(str(folder), message, "check its path and permissions"))) from error
        if not any(is_image(name) for name in names):
            raise DataError(str(_why_no_images(folder, names)))
        files = by_lower_extension(names)
        for image in (folder / name for name in names if is_image(name)):
            yield SourceImage(image, find_caption(image, self.subset, files))


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image that is read."""
    return extension_of(name) in EXTENSIONS


def kinds_of(names: Sequence[str]) -> str:
    """How many files there are of each extension: `300 .heic, 12 .mp4`."""
    counts = Counter(map(extension_of, names))
    return ", ".join(f"{count} {extension}" for extension, count in counts.most_common())


def unread_images(names: Sequence[str]) -> list[str]:
    """Those of a folder's files that are images or videos of a format that is not read, sorted."""
    return sorted(name for name in names if extension_of(name) in UNREAD)


def _why_no_images(folder: Path, names: Sequence[str]) -> Problem:
    """That there are none, and where they may be instead."""
    metadata = next((name for name in METADATA_FILES if name in names), None)
    unread, inner = unread_images(names), _images_inside(folder)
    if metadata:
        hint = f'to read the images that {metadata} lists, set metadata_file = "{(folder / metadata).as_posix()}"'
        return Problem(str(folder), "contains no images", hint)
    if inner:
        counts = [f'{count} {"is" if count == 1 else "are"} in "{path.as_posix()}"' for path, count in inner.items()]
        path = next(iter(inner))
        hint = f'image_dir = "{path.as_posix()}"'
        if name := re.fullmatch(r"(\d+)(?:_(.*))?", path.name):
            class_tokens = f', class_tokens = "{name[2]}"' if name[2] else ""
            hint = f"as kohya_ss has it: {hint}, num_repeats = {name[1]}{class_tokens}"
        hint = hint if len(inner) == 1 else f"each in a [[data.datasets.subsets]]; {hint}"
        return Problem(str(folder), f"contains no images; {some(counts)}", hint)
    if unread:
        message = f"contains no supported images, but {kinds_of(unread)}: {some(unread)}"
        return Problem(str(folder), message, "convert them to JPEG or PNG")
    hint = f"{NAMES} files in it are read, not those in folders inside it"
    return Problem(str(folder), "contains no images", hint)


def _images_inside(folder: Path) -> dict[Path, int]:
    """The folders inside a folder that hold images, with how many; not all are searched where there are many."""
    found, searched, waiting = {}, 0, [(folder, 0)]
    while waiting and searched < _MOST_FOLDERS:
        path, depth = waiting.pop(0)
        searched += 1
        try:
            count = sum(is_image(name) for name in list_files(path))
            inner = [entry.path for entry in os.scandir(path) if entry.name[0] != "." and entry.is_dir()]
        except OSError:
            continue
        if count:
            found[path] = count
        if depth < _DEEP:
            waiting += [(Path(own), depth + 1) for own in sorted(inner)]
    return found
