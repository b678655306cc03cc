"""Names and shapes of the tensors of a transformer, from its settings alone, so that `check` needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.checkpoints import Shapes
from lorakit.models.families.flux1.settings import MLP_RATIO, TIME_CHANNELS, VECTORS, FluxSettings

Tensors = Iterator[tuple[str, tuple[int, ...]]]
"""Name and shape of one tensor after the other."""


def transformer_shapes(settings: Mapping[str, Any]) -> Shapes:
    """The tensors of a transformer with these settings. Raises ValueError for what no FLUX.1 and no Chroma has."""
    return dict(_transformer(FluxSettings.of(settings)))


def _transformer(config: FluxSettings) -> Tensors:
    width = config.width
    yield from _linear("img_in", config.in_channels, width)
    yield from _linear("txt_in", config.joint_attention_dim, width)
    if config.is_chroma:
        yield from _approximator(config)
    else:
        yield from _embedder("time_in", TIME_CHANNELS, width)
        yield from _embedder("vector_in", config.pooled_projection_dim, width)
        yield from _linear("final_layer.adaLN_modulation.1", width, VECTORS["final"] * width)
        if config.guidance_embeds:
            yield from _embedder("guidance_in", TIME_CHANNELS, width)
    for number in range(config.num_layers):
        for stream in ("img", "txt"):
            yield from _double(f"double_blocks.{number}.{stream}", config)
    for number in range(config.num_single_layers):
        block = f"single_blocks.{number}"
        yield from _linear(f"{block}.linear1", width, (3 + MLP_RATIO) * width)
        yield from _linear(f"{block}.linear2", (1 + MLP_RATIO) * width, width)
        yield from _norms(f"{block}.norm", config)
        if not config.is_chroma:
            yield from _linear(f"{block}.modulation.lin", width, VECTORS["single"] * width)
    yield from _linear("final_layer.linear", width, config.patch_channels)


def _double(stream: str, config: FluxSettings) -> Tensors:
    """One stream of a double block."""
    width = config.width
    yield from _linear(f"{stream}_attn.qkv", width, 3 * width)
    yield from _linear(f"{stream}_attn.proj", width, width)
    yield from _norms(f"{stream}_attn.norm", config)
    yield from _linear(f"{stream}_mlp.0", width, MLP_RATIO * width)
    yield from _linear(f"{stream}_mlp.2", MLP_RATIO * width, width)
    if not config.is_chroma:
        yield from _linear(f"{stream}_mod.lin", width, VECTORS["double"] * width)


def _approximator(config: FluxSettings) -> Tensors:
    """The network that gives Chroma's modulation vectors."""
    root, hidden = "distilled_guidance_layer", config.approximator_hidden_dim
    yield from _linear(f"{root}.in_proj", config.approximator_num_channels, hidden)
    for number in range(config.approximator_layers):
        yield from _embedder(f"{root}.layers.{number}", hidden, hidden)
        yield f"{root}.norms.{number}.scale", (hidden,)
    yield from _linear(f"{root}.out_proj", hidden, config.width)


def _norms(path: str, config: FluxSettings) -> Tensors:
    for name in ("query_norm", "key_norm"):
        yield f"{path}.{name}.scale", (config.attention_head_dim,)


def _embedder(path: str, inputs: int, width: int) -> Tensors:
    yield from _linear(f"{path}.in_layer", inputs, width)
    yield from _linear(f"{path}.out_layer", width, width)


def _linear(path: str, inputs: int, outputs: int) -> Tensors:
    yield f"{path}.weight", (outputs, inputs)
    yield f"{path}.bias", (outputs,)
