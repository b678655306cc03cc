"""Anima's captions: Qwen3 reads them, and the LLM adapter asks it by the tokens of T5.

B captions of at most k tokens by Qwen3's tokenizer and m by T5's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.models.families.flow.qwen3 import Qwen3Tokenizer
from lorakit.models.interfaces import Conditioning, Tokens

MAX_TOKENS = 512
"""Longest caption by either tokenizer."""
_END = "</s>"
_PAD = 0


class T5Tokenizer:
    """Turns captions into the ids of T5's tokens; no weights of T5 are needed."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """With the vocabulary in a folder, of which the model knows so many tokens.

        A `ModelError` if the folder's files are unusable, or those of another tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            # Code that comes with a tokenizer is never run.
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises all kinds of exceptions for damaged files
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"the T5 tokenizer in {folder} cannot be read ({reason}); download it again") from error
        end: int | None = self._tokenizer.get_vocab().get(_END)
        if end is None or len(self._tokenizer) > vocabulary:
            raise ModelError(f"the tokenizer in {folder} is not that of T5, whose tokens the LLM adapter knows")
        self._end = end

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, m], each caption with the end token; the mask is 0 behind it."""
        found = self._tokenizer(list(captions), add_special_tokens=False, truncation=True, max_length=MAX_TOKENS - 1)
        return filled([[*own, self._end] for own in found.input_ids], _PAD)


def filled(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids filled up to one length, and their mask, int64 [B, m]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*own, *[pad] * (longest - len(own))] for own in rows])
    return ids, torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in rows])


class AnimaTextEncoder:
    """Qwen3 and the LLM adapter, with their tokenizers."""

    def __init__(
        self, qwen3: nn.Module, adapter: nn.Module, tokenizer: Qwen3Tokenizer, t5_tokenizer: T5Tokenizer
    ) -> None:
        self.qwen3, self.adapter = qwen3, adapter
        self.tokenizer, self.t5_tokenizer = tokenizer, t5_tokenizer

    def tokenize(self, captions: Sequence[str], weighted: bool = False) -> Tokens:  # noqa: ARG002
        """`ids` and `mask` [B, k], `t5_ids` and `t5_mask` [B, m], int64, on the CPU; cut off at the longest length.

        A caption without words has no token by Qwen3's tokenizer; its mask is 0 throughout.
        """
        t5_ids, t5_mask = self.t5_tokenizer(captions)
        return {**self.tokenizer(captions), "t5_ids": t5_ids, "t5_mask": t5_mask}

    def encode(self, tokens: Tokens) -> Conditioning:
        """`hidden_states` [B, max(m, 512), D], zero behind each caption's end by T5's tokenizer.

        The transformer attends to all of these rows.
        """
        device = next(self.adapter.parameters()).device
        ids, mask, t5_ids, t5_mask = (tokens[name].to(device) for name in ("ids", "mask", "t5_ids", "t5_mask"))
        attended = mask.bool()
        # Where there is nothing to attend to, attention is undefined; a state of zeros adds nothing.
        attended[:, 0] = True
        states: Tensor = self.qwen3(input_ids=ids, attention_mask=attended.long()).last_hidden_state
        states = states * mask.unsqueeze(2).to(states.dtype)
        return {"hidden_states": self.adapter(states, attended, t5_ids, t5_mask.bool())}
