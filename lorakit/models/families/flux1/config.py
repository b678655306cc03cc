"""What FLUX.1 and Chroma have in common in the config file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.model_family import CaptionLengths
from lorakit.checkpoints import HubModel
from lorakit.errors import ModelError, Problem
from lorakit.models.families.flow.config import FlowTransformerConfig
from lorakit.models.families.flux1.parts import LAYER_TAGS, LAYOUT

MAX_TOKENS = 512
"""Most tokens of a caption."""
SCHNELL_TOKENS = 256
"""Those of FLUX.1 schnell."""


@frozen(kw_only=True)
class FluxFamilyConfig(FlowTransformerConfig):
    """What FLUX.1 and Chroma have in common."""

    layout = LAYOUT
    layer_tags = LAYER_TAGS
    web_uis = ("Forge",)
    t5_tokenizer: ClassVar[str]
    """The field with T5's tokenizer."""

    max_token_length: int | None = field(default=None, validator=v.optional([v.ge(1), v.le(MAX_TOKENS)]))
    """Maximum caption length in tokens of T5; longer captions are truncated. The model's own when absent: 512, and 256
    for FLUX.1 schnell."""

    @property
    def caption_length(self) -> int:
        """Maximum caption length in tokens."""
        return self.max_token_length or MAX_TOKENS

    @property
    def has_guidance(self) -> bool:
        """Whether the transformer takes a guidance scale."""
        return False

    def caption_lengths(self, captions: Sequence[str], weighted: bool) -> CaptionLengths | None:  # noqa: ARG002
        """The tokens of captions in T5's vocabulary; None where the tokenizer would have to be downloaded."""
        from lorakit.models.families.flow.t5 import T5Tokenizer

        try:
            location = self.stored.tokenizers.get(self.t5_tokenizer, self.stored.location)
            folder = None if isinstance(location, HubModel) else self.stored.tokenizer_folder(self.t5_tokenizer)
            tokenizer = folder and T5Tokenizer(folder, self.caption_length)
        except ModelError:
            return None
        return CaptionLengths(tuple(tokenizer.lengths(captions)), self.caption_length) if tokenizer else None

    def warnings_of_captions(self, captions: Mapping[str, str], weighted: bool) -> Iterator[Problem]:
        """Captions that have more tokens than are read."""
        limit = self.caption_length
        # A token is one byte or more, and one token ends the caption.
        long = {name: text for name, text in captions.items() if len(text.encode()) >= limit}
        lengths = self.caption_lengths(list(long.values()), weighted) if long else None
        cut = [(own, name) for own, name in zip(lengths.tokens, long, strict=True) if own > limit] if lengths else []
        if cut:
            tokens, name = max(cut)
            message = f"{limit} cuts off the end of {len(cut)} of {len(captions)} captions"
            hint = f"set it to {MAX_TOKENS}, or write shorter captions" if limit < MAX_TOKENS else "write shorter ones"
            yield Problem("max_token_length", f"{message}; the longest, of {name}, has {tokens} tokens", hint)
