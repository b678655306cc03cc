"""What the user says of the result, for the metadata of its files."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import field, frozen
from attrs import validators as v

from lorakit.errors import Problem

LARGEST_THUMBNAIL = 1 << 20
"""Maximum bytes of an image in the metadata; readers load all of it to list files."""

_FIRST_BYTES: Mapping[str, bytes] = {
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/jpeg": rb"\xff\xd8\xff",
    "image/gif": rb"GIF8",
    "image/webp": rb"RIFF....WEBP",
}


def _text() -> str | None:
    """A field for a text that is not empty."""
    text: str | None = field(default=None, validator=v.optional(v.min_len(1)))
    return text


@frozen(kw_only=True)
class MetadataSection:
    """Metadata written to saved files (Stability AI Model Metadata Standard)."""

    title: str | None = _text()
    """Title of the LoRA; defaults to `output.name`."""
    author: str | None = _text()
    """Author."""
    description: str | None = _text()
    """Description."""
    license: str | None = _text()
    """Licence."""
    tags: str | None = _text()
    """Comma-separated tags."""
    usage_hint: str | None = _text()
    """Usage instructions."""
    trigger_phrase: str | None = _text()
    """Trigger words to use in prompts."""
    thumbnail: Path | None = None
    """Preview image: a PNG, JPEG, WebP or GIF file of at most 1 MiB."""
    merged_from: str | None = _text()
    """Comma-separated names of the models it was merged from."""
    preprocessor: str | None = _text()
    """Type of input preprocessing, for models that need one."""
    is_negative_embedding: bool | None = None
    """Whether it is intended for negative prompts."""
    minimal: bool = False
    """Omit training details; keep only what tools need to use the file, and the keys of this section."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the thumbnail's file; keys are field names."""
        hint = "a JPEG of 256x256 pixels is enough"
        try:
            content = self._thumbnail()
        except OSError as error:
            yield Problem("thumbnail", f"{self.thumbnail} cannot be read: {error.strerror or error}")
            return
        if content and len(content) > LARGEST_THUMBNAIL:
            size = f"more than {LARGEST_THUMBNAIL >> 20} MiB large"
            yield Problem("thumbnail", f"{self.thumbnail} is {size}, and would be stored in every file", hint)
        elif content is not None and _kind(content) is None:
            yield Problem("thumbnail", f"{self.thumbnail} is not a PNG, JPEG, WebP or GIF image", hint)

    def entries(self) -> dict[str, str]:
        """The entries of a file's metadata, for what is given."""
        texts = {
            name: getattr(self, name)
            for name in (
                "title", "author", "description", "license", "tags", "usage_hint", "trigger_phrase", "merged_from",
                "preprocessor",
            )
        }  # fmt: skip
        if self.is_negative_embedding is not None:
            texts["is_negative_embedding"] = str(self.is_negative_embedding).lower()
        content = self._thumbnail()
        if content is not None:
            texts["thumbnail"] = f"data:{_kind(content)};base64,{base64.b64encode(content).decode()}"
        return {f"modelspec.{name}": text for name, text in texts.items() if text is not None}

    def _thumbnail(self) -> bytes | None:
        """The thumbnail's file, of a larger one no more than shows that it is too large. Raises OSError."""
        if self.thumbnail is None:
            return None
        with self.thumbnail.open("rb") as file:
            return file.read(LARGEST_THUMBNAIL + 1)


def _kind(content: bytes) -> str | None:
    """The media type of an image file, by its first bytes."""
    return next((kind for kind, first in _FIRST_BYTES.items() if re.match(first, content, re.S)), None)
