"""Captions: read from the files beside the images, and varied in each epoch.

What can be done to a caption, and in which order, is what sd-scripts' dataset files say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import compress
from math import floor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorakit.config.datasets import SubsetConfig
from lorakit.data.images.face_crop import stem_without_face
from lorakit.data.images.formats import EXTENSIONS as IMAGE_EXTENSIONS
from lorakit.data.images.formats import extension_of
from lorakit.errors import DataError, Problem
from lorakit.utils.rng import RngFactory, keyed_generator
from lorakit.utils.safe_paths import require_regular_file

_WILDCARD = re.compile(r"\{\{|\}\}|\{((?:\{\{|\}\}|[^}])++)\}")
"""A doubled brace, or a wildcard with its content as group, which may hold doubled braces."""

EXTENSIONS = (".txt", ".caption")
"""Extensions of caption files that are looked for when a subset names none."""


LONGEST = 2**20
"""Bytes that a caption file may have; thousands of times what any text encoder reads."""


class CaptionContext(NamedTuple):
    """When a caption is used."""

    epoch: int
    """Number of the epoch, from 1."""
    step: int
    """Optimizer steps done before."""
    total_steps: int
    """Optimizer steps of the run."""


class CaptionParts(NamedTuple):
    """The tags of a caption."""

    first: list[str]
    """Those that stay first."""
    loose: list[str]
    """Those that may be shuffled and left out."""
    last: list[str]
    """Those that stay last."""


def by_lower_extension(names: Sequence[str]) -> dict[str, str]:
    """The names of files by what they are with their extensions in lower case, and by themselves, which goes first."""
    parts = ((name, name.rpartition(".")) for name in names)
    return {f"{stem}{dot}{extension.lower()}": name for name, (stem, dot, extension) in parts} | {
        name: name for name in names
    }


def find_caption(image: Path, subset: SubsetConfig, names: Mapping[str, str]) -> Path | None:
    """The caption file of an image among the files in its folder: that of the same stem.

    `names` are the files' names, `by_lower_extension`, so that `.TXT` will do too. Where names tell of faces, so will
    the name without the face's numbers.
    """
    stems = [image.stem, stem_without_face(image)] if subset.face_crop_aug_range else [image.stem]
    candidates = (stem + extension for stem in stems for extension in caption_extensions(subset))
    return next((image.with_name(names[name]) for name in candidates if name in names), None)


def caption_extensions(subset: SubsetConfig) -> Sequence[str]:
    """The extensions of the caption files of a subset; the dot may be missing in the config."""
    wanted = subset.caption_extension
    return EXTENSIONS if wanted is None else (wanted if "." in wanted else f".{wanted}",)


def extension_problem(extension: str) -> str:
    """Why files that end so cannot be caption files, as the end of a sentence; empty if they can."""
    if not re.fullmatch(r"[^/\\\0]*[^/\\\0.]", extension):
        return f'must be an extension such as ".txt", not {extension!r}'
    if extension_of(f".{extension}") in IMAGE_EXTENSIONS:
        return f"must not be that of images, {extension!r}"
    return ""


def read_caption(path: Path) -> str:
    """The lines of a caption file that are not blank; an empty caption if there is none.

    Raises DataError where the file cannot be read or is not UTF-8.
    """
    try:
        require_regular_file(path)
        if path.stat().st_size > LONGEST:
            message = f"is longer than any caption: {path.stat().st_size} bytes"
            raise DataError(str(Problem(str(path), message, "remove it, or caption_extension names the wrong files")))
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text from byte {error.start} on"
        raise DataError(str(Problem(str(path), message, "save it as UTF-8"))) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return "\n".join(_lines(text))


def apply_caption_options(caption: str, subset: SubsetConfig, use: CaptionContext, generator: RngFactory) -> str:
    """The caption as it is used once.

    In this order: left out as a whole or not; one line of it; prefix and suffix; wildcards; tags grown
    into, shuffled and left out; the second separator.
    """
    every, rate = subset.caption_dropout_every_n_epochs, subset.caption_dropout_rate
    if (every and use.epoch % every == 0) or (rate > 0 and generator("caption_dropout").random() < rate):
        return ""
    lines = _lines(caption) if subset.enable_wildcard else [caption]
    line = lines[generator("caption_line").integers(len(lines))] if len(lines) > 1 else lines[0]
    return _arranged(_filled_in(line, subset, generator), subset, use, generator)


def caption_variants(caption: str, subset: SubsetConfig) -> tuple[str, ...] | None:
    """All that `apply_caption_options` makes of a caption over a run; None where tags or wildcards vary it freely."""
    texts = []
    for line in _lines(caption) if subset.enable_wildcard else [caption]:
        if subset.enable_wildcard and has_choice(_framed(line, subset)):
            return None
        # No draw is left that could change the outcome, so it does not matter for what it is drawn.
        text = _filled_in(line, subset, keyed_generator)
        if _vary(split_parts(text, subset).loose, subset):
            return None
        texts.append(_arranged(text, subset, CaptionContext(1, 0, 1), keyed_generator))
    if subset.caption_dropout_rate or subset.caption_dropout_every_n_epochs:
        texts.append("")
    return tuple(dict.fromkeys(texts))


def longest_captions(caption: str, subset: SubsetConfig) -> list[str]:
    """What `apply_caption_options` makes of each line of a caption at most: all tags, longest wildcards."""
    lines = [_framed(line, subset) for line in (_lines(caption) if subset.enable_wildcard else [caption])]
    if subset.enable_wildcard:
        lines = [_WILDCARD.sub(lambda own: max((own[1] or own[0][0]).split("|"), key=len), line) for line in lines]
    return [_arranged(line, subset, None, keyed_generator) for line in lines]


def fill_wildcards(text: str, generator: np.random.Generator) -> str:
    """The text with one part of each `{a|b|c}`, and braces for `{{` and `}}`."""

    def pick(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        options = match[1].split("|")
        return options[generator.integers(len(options))].replace("{{", "{").replace("}}", "}")

    return _WILDCARD.sub(pick, text)


def has_choice(text: str) -> bool:
    """Whether `fill_wildcards` can make more than one thing of a text."""
    return any(len(set(match[1].split("|"))) > 1 for match in _WILDCARD.finditer(text) if match[1])


def split_parts(text: str, subset: SubsetConfig) -> CaptionParts:
    """The tags of a caption, split by `keep_tokens_separator` if the caption contains it, else by `keep_tokens`."""
    separator = subset.keep_tokens_separator
    if separator and separator in text:
        first, loose, *last = (split_tags(part, subset.caption_separator) for part in text.split(separator))
        return CaptionParts(first, loose, [tag for part in last for tag in part])
    tags = split_tags(text, subset.caption_separator)
    return CaptionParts(tags[: subset.keep_tokens], tags[subset.keep_tokens :], [])


def tags_after(step: int, tags: int, subset: SubsetConfig, total_steps: int) -> int:
    """Number of a caption's loose tags to use after `step` steps: ⌊step · (tags − min) / warm-up⌋ + min."""
    warmup = subset.token_warmup_step
    steps = warmup if warmup >= 1 else floor(warmup * total_steps)
    least = subset.token_warmup_min
    return tags if step >= steps or tags <= least else floor(step * (tags - least) / steps) + least


def split_tags(caption: str, separator: str) -> list[str]:
    """The tags of a caption, without spaces around them and without empty ones."""
    tags = (tag.strip() for tag in caption.split(separator))
    return [tag for tag in tags if tag]


def _lines(text: str) -> list[str]:
    """The lines that are not blank, without spaces around them; an empty one if there is none."""
    lines = (line.strip() for line in re.split(r"[\r\n]+", text))
    return [line for line in lines if line] or [""]


def _framed(line: str, subset: SubsetConfig) -> str:
    return " ".join(filter(None, (subset.caption_prefix, line, subset.caption_suffix)))


def _filled_in(line: str, subset: SubsetConfig, generator: RngFactory) -> str:
    text = _framed(line, subset)
    return fill_wildcards(text, generator("wildcard")) if subset.enable_wildcard else text


def _vary(loose: Sequence[str], subset: SubsetConfig) -> bool:
    """Whether loose tags may be used in another order or number than they are written in."""
    return (
        (subset.shuffle_caption and len(loose) > 1)
        or (subset.caption_tag_dropout_rate > 0 and len(loose) > 0)
        or (subset.token_warmup_step > 0 and len(loose) > subset.token_warmup_min)
    )


def _arranged(text: str, subset: SubsetConfig, use: CaptionContext | None, generator: RngFactory) -> str:
    """The text with its tags as this use has them, or all of them; unchanged where nothing is to be done to them."""
    parts = split_parts(text, subset)
    if _vary(parts.loose, subset) or (subset.keep_tokens_separator and subset.keep_tokens_separator in text):
        loose = list(parts.loose)
        if use:
            loose = loose[: tags_after(use.step, len(loose), subset, use.total_steps)]
            if subset.shuffle_caption:
                loose = [loose[position] for position in generator("caption").permutation(len(loose))]
            if subset.caption_tag_dropout_rate:
                kept = generator("tag_dropout").random(len(loose)) >= subset.caption_tag_dropout_rate
                loose = list(compress(loose, kept))
        tags = [*parts.first, *loose, *parts.last]
        text = (subset.caption_separator.rstrip() + " ").join(tags)
    return text.replace(subset.secondary_separator, subset.caption_separator) if subset.secondary_separator else text
