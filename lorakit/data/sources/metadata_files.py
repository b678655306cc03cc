"""Metadata files: the captions of many images in one file, as sd-scripts' tools write them; imports no torch.

JSON maps each image's path to a table with `caption` and `tags`; of JSON Lines, each line is such a
table with `image_path`, or with `file_name` and `text` as in the Hub's `metadata.jsonl` and `metadata.csv`.
Paths are relative to the subset's `image_dir`, and must not lead out of it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.api.dataset_source import SourceImage
from lorakit.config.datasets import SubsetConfig
from lorakit.config.values import is_text, toml_repr
from lorakit.data.images.formats import EXTENSIONS, UNREAD
from lorakit.errors import DataError, Problem

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""Names that metadata files have on the Hugging Face Hub, in the folder of their images."""

_PATHS = ("image_path", "file_name", "image")
_CAPTIONS = ("caption", "text", "prompt")
"""What sd-scripts, the Hub's image folders and other tools call an image's path and its caption."""

_LONGEST = 2**28


@frozen
class MetadataFileSource:
    """The images of a subset's `metadata_file`, sorted by their paths in it."""

    subset: SubsetConfig

    def list_images(self, problems: list[str]) -> list[SourceImage]:
        """The images; entries that cannot be used are added to the problems.

        Raises DataError where the file cannot be read.
        """
        file, subset = self.subset.metadata_file, self.subset
        assert file is not None  # noqa: S101 - as the config was checked
        listed: dict[str, SourceImage] = {}
        for path, entry in _entries(file):
            key = f"{file}: {path}"
            texts = [_first(entry, names) for names in (_CAPTIONS, ("tags",))] if isinstance(entry, Mapping) else []
            inside = _inside(subset.image_dir, path) if isinstance(path, str) and path else None
            image = _image(subset.image_dir, inside) if inside else None
            if not isinstance(path, str) or not path:
                hint = "expected in one of the keys " + ", ".join(_PATHS)
                problem = Problem(f"{file}: {toml_repr(entry)}", "has no image path", hint)
            elif not texts or not all(is_text(text) for text in texts):
                problem = Problem(key, "must have caption and tags, each a text in UTF-8")
            elif path in listed:
                problem = Problem(key, "is listed twice", "remove one of the two")
            elif inside is None:
                hint = f"give an image_dir that holds all images of the file, instead of {subset.image_dir}"
                problem = Problem(key, "is outside image_dir", hint)
            elif image is None and Path(key).suffix.lower() in UNREAD:
                problem = Problem(key, "has an unsupported format", "convert it to JPEG or PNG")
            elif image is None:
                hint = f"paths are relative to image_dir, {subset.image_dir}"
                problem = Problem(key, "is not an image file", hint)
            else:
                listed[path] = SourceImage(image, _caption(subset, *texts) or None, name=path)
                continue
            problems.append(str(problem))
        return sorted(listed.values(), key=lambda item: item.name)


def _first(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What an entry has under the first of several names, where it is not empty; else an empty text."""
    return next((entry[name] for name in names if entry.get(name)), "")


def _entries(file: Path) -> Sequence[tuple[Any, Any]]:
    """Paths and tables as in the file."""
    try:
        if file.stat().st_size > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} bytes")
        text = file.read_text(encoding="utf-8-sig")
        found = _READERS.get(file.suffix.lower(), json.loads)(text)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(str(Problem(str(file), "is not UTF-8 text", "save it as UTF-8"))) from error
    except (ValueError, RecursionError, csv.Error) as error:
        kind = "CSV" if file.suffix.lower() == ".csv" else "JSON"
        raise DataError(f"{file}: is not valid {kind}: {error}") from error
    tables = found if isinstance(found, list) and all(isinstance(line, dict) for line in found) else []
    entries = list(found.items()) if isinstance(found, dict) else [(_first(line, _PATHS), line) for line in tables]
    if not entries:
        raise DataError(str(Problem(str(file), "lists no images", "each needs its path, and a table with its caption")))
    return entries


def _json_lines(text: str) -> list[Any]:
    found = []
    # Lines end at line feeds alone: texts in JSON may hold the other characters that `splitlines` parts at.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{error} (line {number} of the file)") from error
    return found


def _rows(text: str) -> list[dict[str, str]]:
    """The rows of a table whose first line says what its columns are."""
    return [{name: value for name, value in row.items() if name} for row in csv.DictReader(io.StringIO(text))]


_READERS: Mapping[str, Callable[[str], Any]] = {".jsonl": _json_lines, ".csv": _rows}


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
    """Caption and tags joined, with the tags after every line."""
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    joint = subset.caption_separator.rstrip() + " "
    return "\n".join(joint.join(filter(None, (line, tags.strip()))) for line in lines)
