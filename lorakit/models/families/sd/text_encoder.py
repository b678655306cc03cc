"""The text encoder: captions to the hidden states that the U-Net attends to.

B captions, n chunks of 77 tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.interfaces import Conditioning, Tokens
from lorakit.models.weights.checkpoint import CheckpointPart

# Others change nothing here, or are for the library alone, which may even fetch code that they name.
_SETTINGS = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "pad_token_id", "bos_token_id",
    "eos_token_id",
})  # fmt: skip


class ClipTextEncoder:
    """A CLIP text encoder with its tokenizer."""

    def __init__(self, module: nn.Module, tokenizer: CaptionTokenizer, clip_skip: int = 1) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.clip_skip = clip_skip

    def tokenize(self, captions: Sequence[str], weighted: bool = False) -> Tokens:
        """`ids`, int64 [B, n, 77], on the CPU; captions are cut off at the longest length.

        With `weighted` also `weights`, float32 of the same shape: what brackets in the captions say.
        """
        if not weighted:
            return {"ids": self.tokenizer(captions)}
        ids, weights = self.tokenizer.weighted(captions)
        return {"ids": ids, "weights": weights}

    def encode(self, tokens: Tokens) -> Conditioning:
        """Hidden states [B, 75n+2, D] of token ids [B, n, 77], each chunk encoded alone, times the weights."""
        ids = tokens["ids"]
        device = next(self.module.parameters()).device
        output = self.module(ids.flatten(0, 1).to(device), output_hidden_states=self.clip_skip > 1)
        states: Tensor = output.last_hidden_state
        if self.clip_skip > 1:  # normalised as the last layer's output is
            states = self.module.get_submodule("final_layer_norm")(output.hidden_states[-self.clip_skip])
        return {"hidden_states": join_chunks(states.view(*ids.shape, states.shape[-1]), tokens.get("weights"))}


def join_chunks(states: Tensor, weights: Tensor | None = None) -> Tensor:
    """One sequence of hidden states [B, 75n+2, D] from those of chunks [B, n, 77, D], times weights [B, n, 77].

    Of several chunks, only the first keeps its start token and only the last its end token.
    """
    if weights is not None:
        states = (states * weights.to(states.device).unsqueeze(-1)).to(states.dtype)
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)


def clip_module(part: CheckpointPart) -> nn.Module:
    """A module for the text encoder, its weights still to be read."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    settings = {name: value for name, value in part.settings.items() if name in _SETTINGS}
    return CLIPTextModel(CLIPTextConfig(**settings))


def set_positions(module: nn.Module, part: CheckpointPart, device: torch.device) -> None:
    """Give the text encoder the numbers of the positions, which files need not hold."""
    positions = torch.arange(part.shape_of("embeddings.position_embedding.weight")[0], device=device)
    module.get_submodule("embeddings").position_ids = positions.unsqueeze(0)


def checkpoint_layers(module: nn.Module, _: float = 1.0, *, layers: str = "encoder.layers") -> None:
    """Recompute the activations of a text encoder's layers in the backward pass; its dropout stays off.

    `layers` is the path of the layers.

    transformers recomputes only what is in training mode, so the layers are, but not what is in them.
    """
    # Newer versions of transformers warn of the older name.
    name = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
    enable = getattr(module, f"{name}_checkpointing_enable")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    for layer in module.get_submodule(layers).children():
        layer.training = True
