"""The text encoders of FLUX.1, CLIP ViT-L and T5, and of Chroma, T5 alone.

B captions of m tokens of T5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.models.families.flow.t5 import T5Tokenizer
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.interfaces import Conditioning, Tokens


class FluxTokenizer:
    """The tokenizers of both text encoders."""

    def __init__(self, clip: CaptionTokenizer, t5: T5Tokenizer) -> None:
        self.clip = clip
        self.t5 = t5

    def __call__(self, captions: Sequence[str], weighted: bool = False) -> Tokens:  # noqa: ARG002
        """`clip`, int64 [B, 1, 77], and `t5`, int64 [B, m], always as many as T5 may have; longer ones are cut off."""
        return {"clip": self.clip(captions), "t5": self.t5(captions, length=self.t5.max_length)["ids"]}


class FluxTextEncoder:
    """CLIP, of which the transformer gets the pooled caption, and T5."""

    def __init__(self, clip: nn.Module, t5: nn.Module, tokenizer: FluxTokenizer) -> None:
        self.clip = clip
        self.t5 = t5
        self.tokenize = tokenizer

    def encode(self, tokens: Tokens) -> Conditioning:
        """`hidden_states` [B, m, D] of T5 and `text_embeds` [B, D'] of CLIP.

        The model was trained without masks: T5 and the transformer see what fills captions up.
        """
        pooled = encode_clip(self.clip, tokens, self.tokenize.clip.end)
        return {"hidden_states": encode_t5(self.t5, tokens["t5"]), "text_embeds": pooled}


class ChromaTextEncoder:
    """T5 alone."""

    def __init__(self, module: nn.Module, tokenizer: T5Tokenizer) -> None:
        self.module = module
        self.tokenizer = tokenizer

    def tokenize(self, captions: Sequence[str], weighted: bool = False) -> Tokens:  # noqa: ARG002
        """`ids` and `mask`, int64 [B, m], on the CPU; captions are cut off at the longest length."""
        return self.tokenizer(captions)

    def encode(self, tokens: Tokens) -> Conditioning:
        """`hidden_states` [B, m, D] and `attention_mask`, bool [B, m], which has one token of padding."""
        ids, mask = tokens["ids"], tokens["mask"]
        states = encode_t5(self.module, ids, mask)
        seen = torch.arange(ids.shape[1]) <= mask.sum(dim=1, keepdim=True)
        return {"hidden_states": states * seen.unsqueeze(2).to(states), "attention_mask": seen.to(states.device)}


def encode_clip(module: nn.Module, tokens: Tokens, end: int) -> Tensor:
    """The pooled captions [B, D']: the state at each one's first end token, by its id."""
    ids = tokens["clip"][:, 0].to(next(module.parameters()).device)
    states: Tensor = module(ids).last_hidden_state
    return states[torch.arange(len(ids), device=ids.device), (ids == end).int().argmax(dim=1)]


def encode_t5(module: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The states [B, m, D] of token ids [B, m]; with a mask, no token sees those for which it is 0."""
    device = next(module.parameters()).device
    # What T5 takes for a missing mask is one of ones.
    attended = torch.ones_like(ids) if mask is None else mask
    states: Tensor = module(input_ids=ids.to(device), attention_mask=attended.to(device)).last_hidden_state
    return states
