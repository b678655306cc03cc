"""Captions as batches hold them: encoded before training, or tokenized to be encoded in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attrs import frozen

from lorakit.data.cache.store import Cache
from lorakit.errors import DataError, Problem
from lorakit.models.interfaces import Conditioning, Tokens


@frozen
class CachedPrompts:
    """Captions that were encoded before training."""

    cache: Cache
    """Where they are."""
    keys: Mapping[str, str]
    """The key of each caption in the cache."""
    collate: Callable[[Sequence[Conditioning]], Conditioning]
    """Puts captions together as one batch."""

    def load(self, texts: Sequence[str]) -> tuple[Conditioning, None]:
        """The conditioning of captions, [B, …]. Raises DataError where one is not in the cache, or was damaged."""
        missing = [text for text in texts if text not in self.keys]
        if missing:
            message = "was not encoded before training, so no batch can have it"
            raise DataError(str(Problem(f"caption {missing[0]!r}", message, "this is a bug in lorakit; report it")))
        keys = [self.keys[text] for text in texts]
        entries = [self.cache.load(key) for key in keys]
        try:
            return self.collate(entries), None
        except (KeyError, RuntimeError) as error:
            files = ", ".join(str(self.cache.path(key)) for key in dict.fromkeys(keys))
            raise DataError(str(Problem(files, f"do not fit together: {error}", "remove these files"))) from error


@frozen
class LivePrompts:
    """Captions that are encoded in each step."""

    tokenize: Callable[[Sequence[str]], Tokens]
    """The text encoder's `tokenize`."""

    def load(self, texts: Sequence[str]) -> tuple[None, Tokens]:
        """The tokens of captions, [B, …]."""
        return None, self.tokenize(texts)


Prompts = CachedPrompts | LivePrompts
