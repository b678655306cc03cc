"""Captions: read from the files beside the images, and shuffled anew in each epoch."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

import numpy as np

from lorakit.config.datasets import SubsetConfig
from lorakit.errors import DataError, Problem

EXTENSIONS = (".txt", ".caption")
"""Extensions of caption files that are looked for when a subset names none."""


def find_caption(image: Path, subset: SubsetConfig, names: Container[str]) -> Path | None:
    """The caption file of an image among the files of these names in its folder: that of the same stem."""
    wanted = subset.caption_extension
    extensions = EXTENSIONS if wanted is None else [wanted if "." in wanted else f".{wanted}"]
    candidates = (image.stem + extension for extension in extensions)
    return next((image.with_name(name) for name in candidates if name in names), None)


def read_caption(path: Path) -> str:
    """The first line of a caption file that is not blank; an empty caption if there is none.

    Raises DataError where the file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start})"
        raise DataError(str(Problem(str(path), message, "save it as UTF-8"))) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    lines = (line.strip() for line in re.split(r"[\r\n]+", text))
    return next(filter(None, lines), "")


def caption_for_epoch(caption: str, subset: SubsetConfig, generator: np.random.Generator) -> str:
    """The caption as it is used once: with `shuffle_caption`, all tags but the first `keep_tokens` shuffled."""
    if not is_shuffled(caption, subset):
        return caption
    tags = split_tags(caption, subset.caption_separator)
    fixed, loose = tags[: subset.keep_tokens], tags[subset.keep_tokens :]
    shuffled = [loose[position] for position in generator.permutation(len(loose))]
    return (subset.caption_separator.rstrip() + " ").join(fixed + shuffled)


def is_shuffled(caption: str, subset: SubsetConfig) -> bool:
    """Whether the caption has tags that `caption_for_epoch` puts into another order from epoch to epoch."""
    return subset.shuffle_caption and len(split_tags(caption, subset.caption_separator)) > subset.keep_tokens + 1


def split_tags(caption: str, separator: str) -> list[str]:
    """The tags of a caption, without spaces around them and without empty ones."""
    tags = (tag.strip() for tag in caption.split(separator))
    return [tag for tag in tags if tag]
