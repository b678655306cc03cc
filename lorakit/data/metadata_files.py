"""Metadata files: the captions of many images in one file, as sd-scripts' tools write them; imports no torch.

JSON maps each image's path to a table with `caption` and `tags`; of JSON Lines, each line is such a
table with `image_path`. Paths are relative to the subset's `image_dir`, and must not lead out of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.config.datasets import SubsetConfig
from lorakit.config.values import is_text
from lorakit.data.images import EXTENSIONS
from lorakit.errors import DataError, Problem

_LONGEST = 2**28


@frozen
class ListedImage:
    """An image of a metadata file."""

    path: str
    """The image's path as it is written there."""
    image: Path
    """The image file."""
    caption: str
    """Caption and tags; with `enable_wildcard` it may have several lines."""


def read_metadata_file(file: Path, subset: SubsetConfig, problems: list[str]) -> list[ListedImage]:
    """The images of a metadata file, sorted by their paths; entries that cannot be used are added to the problems.

    Raises DataError where the file cannot be read.
    """
    listed: dict[str, ListedImage] = {}
    for path, entry in _entries(file):
        texts = [entry.get(name) or "" for name in ("caption", "tags")] if isinstance(entry, Mapping) else []
        inside = _inside(subset.image_dir, path) if isinstance(path, str) else None
        image = _image(subset.image_dir, inside) if inside else None
        if not isinstance(path, str) or not texts or not all(is_text(text) for text in texts):
            problems.append(str(Problem(f"{file}: {path}", "must have caption and tags, each a text in UTF-8")))
        elif path in listed:
            problems.append(str(Problem(f"{file}: {path}", "is listed twice", "remove one of the two")))
        elif inside is None:
            hint = f"give an image_dir that holds all images of the file, instead of {subset.image_dir}"
            problems.append(str(Problem(f"{file}: {path}", "leads out of image_dir", hint)))
        elif image is None:
            hint = f"paths are relative to image_dir, {subset.image_dir}"
            problems.append(str(Problem(f"{file}: {path}", "is no image file", hint)))
        else:
            listed[path] = ListedImage(path, image, _caption(subset, *texts))
    return sorted(listed.values(), key=lambda own: own.path)


def _entries(file: Path) -> Sequence[tuple[Any, Any]]:
    """Paths and tables as they stand in the file."""
    try:
        if file.stat().st_size > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} bytes")
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() != ".jsonl":
            found = json.loads(text)
            entries = list(found.items()) if isinstance(found, dict) else []
        else:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            entries = [(line.get("image_path"), line) for line in lines if isinstance(line, dict)]
            entries = entries if len(entries) == len(lines) else []
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(str(Problem(str(file), "is not UTF-8 text", "save it as UTF-8"))) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not valid JSON: {error}") from error
    if not entries:
        raise DataError(str(Problem(str(file), "lists no images", "each needs its path, and a table with its caption")))
    return entries


def _inside(folder: Path, path: str) -> str | None:
    """A path as it is relative to a folder; None if it leads out of it, where only the user may point."""
    relative = os.path.relpath(os.path.normpath(folder / path), folder)
    return None if Path(relative).parts[:1] == (os.pardir,) else relative


def _image(folder: Path, path: str) -> Path | None:
    """The image file of a path, which may lack its extension."""
    names = [path] if Path(path).suffix.lower() in EXTENSIONS else [path + end for end in sorted(EXTENSIONS)]
    # Unlike `Path.is_file`, this raises nothing for names that are too long.
    found = (folder / name for name in names if "\0" not in name and os.path.isfile(folder / name))  # noqa: PTH113
    return next(found, None)


def _caption(subset: SubsetConfig, caption: str, tags: str) -> str:
    """Caption and tags joined, with the tags after every line that is used."""
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    used = lines if subset.enable_wildcard else lines[:1]
    joint = subset.caption_separator.rstrip() + " "
    return "\n".join(joint.join(filter(None, (line, tags.strip()))) for line in used)
