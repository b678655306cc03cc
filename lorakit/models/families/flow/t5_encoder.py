"""T5's encoder as transformers has it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5LayerFF, T5Stack

from lorakit.models.families.flow.t5 import SETTINGS
from lorakit.models.weights.checkpoint import CheckpointPart


class FeedForward(nn.Module):
    """The layers of one of transformers' MLPs, with nothing asked of them but what they compute.

    The original looks at the weight of its last layer, which adapters and quantized layers do not have.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name, layer in original.named_children():
            self.add_module(name, layer)
        self.inputs = [name for name in ("wi", "wi_0", "wi_1") if hasattr(self, name)]

    def forward(self, states: Tensor) -> Tensor:
        """[B, m, D] of states of that shape."""
        children = dict(self.named_children())
        hidden, *gates = (children[name](states) for name in self.inputs)
        hidden = children["act"](hidden)
        out: Tensor = children["wo"](hidden * gates[0] if gates else hidden)
        return out


def t5_module(part: CheckpointPart) -> nn.Module:
    """A module for the text encoder, its weights still to be read."""
    settings = {name: value for name, value in part.settings.items() if name in SETTINGS and value is not None}
    module = T5Stack(T5Config(**settings, is_encoder_decoder=False, use_cache=False, dropout_rate=0.0))
    for layer in module.modules():
        if isinstance(layer, T5LayerFF):
            layer.DenseReluDense = FeedForward(layer.DenseReluDense)  # type: ignore[assignment]
    return module
