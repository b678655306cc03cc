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


class SDXLTextEncoder:
    """CLIP ViT-L and OpenCLIP ViT-bigG, each with its tokenizer (Podell et al., 2023, arXiv:2307.01952)."""

    def __init__(self, modules: Sequence[nn.Module], tokenizers: Sequence[CaptionTokenizer]) -> None:
        """Both text encoders, and both tokenizers, in the order of their numbers."""
        self.modules = modules
        self.tokenizers = tokenizers

    def tokenize(self, captions: Sequence[str], weighted: bool = False) -> Tokens:
        """`ids_1` and `ids_2`, int64 [B, n, 77], on the CPU; captions are cut off at the longest length.

        With `weighted` also `weights`, float32 of the same shape: what brackets in the captions say.
        """
        first, second = self.tokenizers
        if not weighted:
            return {"ids_1": first(captions), "ids_2": second(captions)}
        ids, weights = first.weighted(captions)
        return {"ids_1": ids, "ids_2": second.weighted(captions)[0], "weights": weights}

    def encode(self, tokens: Tokens) -> Conditioning:
        """`hidden_states` [B, 75n+2, D₁+D₂] and `text_embeds` [B, D₂].

        The hidden states are those of the last layer but one of each text encoder, without the final normalisation,
        each chunk encoded alone, times the weights. Pooled is what the second makes of the first end token of the
        first chunk, whatever its weight.
        """
        first, second = self.modules
        states_1, _ = _encode(first, tokens["ids_1"])
        states_2, last = _encode(second, tokens["ids_2"])
        states = join_chunks(torch.cat([states_1, states_2], dim=-1), tokens.get("weights"))
        opening = tokens["ids_2"][:, 0].to(last.device)
        ends = (opening == self.tokenizers[1].end).int().argmax(dim=1)
        pooled = last[torch.arange(len(ends), device=last.device), 0, ends]
        return {"hidden_states": states, "text_embeds": second.get_submodule("text_projection")(pooled)}


def _encode(module: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The states of the last layer but one, and of the last, normalised: [B, n, 77, D] of token ids [B, n, 77]."""
    device = next(module.parameters()).device
    output = module(ids.flatten(0, 1).to(device), output_hidden_states=True)
    found: list[Tensor] = [output.hidden_states[-2], output.last_hidden_state]
    second_last, last = (states.view(*ids.shape, states.shape[-1]) for states in found)
    return second_last, last


def projected_clip_module(part: CheckpointPart) -> nn.Module:
    """A module for the second text encoder and its projection, its weights still to be read."""
    module, settings = clip_module(part), part.settings
    module.text_projection = nn.Linear(settings["hidden_size"], settings.get("projection_dim", 512), bias=False)
    return module
