"""The two text encoders of SDXL: captions to the hidden states that the U-Net attends to, and a pooled vector.

B captions, n chunks of 77 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.models.families.sd.text_encoder import clip_module, join_chunks
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.interfaces import Conditioning, Tokens
from lorakit.models.weights.checkpoint import CheckpointPart


class SDXLTokenizer:
    """The tokenizers of both text encoders."""

    def __init__(self, first: CaptionTokenizer, second: CaptionTokenizer) -> None:
        self.first = first
        self.second = second

    def __call__(self, captions: Sequence[str], weighted: bool = False) -> Tokens:
        """`ids_1` and `ids_2`, int64 [B, n, 77], on the CPU; captions are cut off at the longest length.

        With `weighted` also `weights`, float32 of the same shape: what brackets in the captions say.
        """
        if not weighted:
            return {"ids_1": self.first(captions), "ids_2": self.second(captions)}
        ids, weights = self.first.weighted(captions)
        return {"ids_1": ids, "ids_2": self.second.weighted(captions)[0], "weights": weights}


class SDXLTextEncoder:
    """CLIP ViT-L and OpenCLIP ViT-bigG with their tokenizers (Podell et al., 2023, arXiv:2307.01952)."""

    def __init__(self, first: nn.Module, second: nn.Module, tokenizer: SDXLTokenizer) -> None:
        self.first = first
        self.second = second
        self.tokenize = tokenizer

    def encode(self, tokens: Tokens) -> Conditioning:
        """`hidden_states` [B, 75n+2, D₁+D₂] and `text_embeds` [B, D₂].

        The hidden states are those of the last layer but one of each text encoder, without the final normalisation,
        each chunk encoded alone, times the weights.
        """
        states_1 = encode_first(self.first, tokens)
        return join(states_1, *encode_second(self.second, tokens, self.tokenize.second.end), tokens)


def encode_first(module: nn.Module, tokens: Tokens) -> Tensor:
    """The states [B, n, 77, D₁] of the last layer but one of the first text encoder."""
    return _states(module, tokens["ids_1"])[0]


def encode_second(module: nn.Module, tokens: Tokens, end: int) -> tuple[Tensor, Tensor]:
    """The states [B, n, 77, D₂] of the last layer but one of the second text encoder, and the pooled captions [B, D₂].

    Pooled is the projection of the last layer's state at the first end token, by its id, of the first chunk.
    """
    states, last = _states(module, tokens["ids_2"])
    ends = (tokens["ids_2"][:, 0].to(last.device) == end).int().argmax(dim=1)
    pooled = last[torch.arange(len(ends), device=last.device), 0, ends]
    return states, module.get_submodule("text_projection")(pooled)


def join(states_1: Tensor, states_2: Tensor, pooled: Tensor, tokens: Tokens) -> Conditioning:
    """The conditioning of captions from what both text encoders make of their tokens."""
    states = join_chunks(torch.cat([states_1, states_2], dim=-1), tokens.get("weights"))
    return {"hidden_states": states, "text_embeds": pooled}


def _states(module: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The states of the last layer but one, and of the last, normalised: [B, n, 77, D] of token ids [B, n, 77]."""
    output = module(ids.flatten(0, 1).to(next(module.parameters()).device), output_hidden_states=True)
    shape = (*ids.shape, output.last_hidden_state.shape[-1])
    return output.hidden_states[-2].view(shape), output.last_hidden_state.view(shape)


def projected_clip_module(part: CheckpointPart) -> nn.Module:
    """A module for the second text encoder and its projection, its weights still to be read."""
    module, settings = clip_module(part), part.settings
    module.text_projection = nn.Linear(settings["hidden_size"], settings.get("projection_dim", 512), bias=False)
    return module
