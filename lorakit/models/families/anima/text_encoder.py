"""Anima's captions: Qwen3 reads them, and the LLM adapter asks it by the tokens of T5.

B captions of at most k tokens by Qwen3's tokenizer and m by T5's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lorakit.models.families.flow.qwen3 import Qwen3Tokenizer
from lorakit.models.families.flow.t5 import T5Tokenizer
from lorakit.models.interfaces import Conditioning, Tokens


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
        t5_tokens = self.t5_tokenizer(captions)
        return {**self.tokenizer(captions), **{f"t5_{name}": tensor for name, tensor in t5_tokens.items()}}

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
