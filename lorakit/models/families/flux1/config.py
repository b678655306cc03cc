"""What FLUX.1 and Chroma have in common in the config file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from attrs import field, frozen
from attrs import validators as v

from lorakit.models.families.flow.config import MAX_TOKENS, FlowTransformerConfig, TokenCounter
from lorakit.models.families.flux1.parts import LAYER_TAGS, LAYOUT

SCHNELL_TOKENS = 256
"""Those of FLUX.1 schnell."""


@frozen(kw_only=True)
class FluxFamilyConfig(FlowTransformerConfig):
    """What FLUX.1 and Chroma have in common."""

    layout = LAYOUT
    layer_tags = LAYER_TAGS
    web_uis = ("Forge",)
    length_key = "max_token_length"
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

    def token_counters(self) -> Iterator[TokenCounter]:
        """T5's tokenizer."""
        from lorakit.models.families.flow.t5 import T5Tokenizer

        yield T5Tokenizer(self.tokenizer_on_disk(self.t5_tokenizer), self.caption_length).lengths
