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


def _transformer(settings: FluxSettings) -> Tensors:
    width = settings.width
    yield from _linear("img_in", settings.in_channels, width)
    yield from _linear("txt_in", settings.joint_attention_dim, width)
    if settings.is_chroma:
        yield from _approximator(settings)
    else:
        yield from _embedder("time_in", TIME_CHANNELS, width)
        yield from _embedder("vector_in", settings.pooled_projection_dim, width)
        yield from _linear("final_layer.adaLN_modulation.1", width, VECTORS["final"] * width)
        if settings.guidance_embeds:
            yield from _embedder("guidance_in", TIME_CHANNELS, width)
    for number in range(settings.num_layers):
        for stream in ("img", "txt"):
            yield from _double(f"double_blocks.{number}.{stream}", settings)
    for number in range(settings.num_single_layers):
        block = f"single_blocks.{number}"
        yield from _linear(f"{block}.linear1", width, (3 + MLP_RATIO) * width)
        yield from _linear(f"{block}.linear2", (1 + MLP_RATIO) * width, width)
        yield from _norms(f"{block}.norm", settings)
        if not settings.is_chroma:
            yield from _linear(f"{block}.modulation.lin", width, VECTORS["single"] * width)
    yield from _linear("final_layer.linear", width, settings.patch_channels)


def _double(stream: str, settings: FluxSettings) -> Tensors:
    """One stream of a double block."""
    width = settings.width
    yield from _linear(f"{stream}_attn.qkv", width, 3 * width)
    yield from _linear(f"{stream}_attn.proj", width, width)
    yield from _norms(f"{stream}_attn.norm", settings)
    yield from _linear(f"{stream}_mlp.0", width, MLP_RATIO * width)
    yield from _linear(f"{stream}_mlp.2", MLP_RATIO * width, width)
    if not settings.is_chroma:
        yield from _linear(f"{stream}_mod.lin", width, VECTORS["double"] * width)


def _approximator(settings: FluxSettings) -> Tensors:
    """The network that gives Chroma's modulation vectors."""
    root, hidden = "distilled_guidance_layer", settings.approximator_hidden_dim
    yield from _linear(f"{root}.in_proj", settings.approximator_num_channels, hidden)
    for number in range(settings.approximator_layers):
        yield from _embedder(f"{root}.layers.{number}", hidden, hidden)
        yield f"{root}.norms.{number}.scale", (hidden,)
    yield from _linear(f"{root}.out_proj", hidden, settings.width)


def _norms(path: str, settings: FluxSettings) -> Tensors:
    for name in ("query_norm", "key_norm"):
        yield f"{path}.{name}.scale", (settings.attention_head_dim,)


def _embedder(path: str, inputs: int, width: int) -> Tensors:
    yield from _linear(f"{path}.in_layer", inputs, width)
    yield from _linear(f"{path}.out_layer", width, width)


def _linear(path: str, inputs: int, outputs: int) -> Tensors:
    yield f"{path}.weight", (outputs, inputs)
    yield f"{path}.bias", (outputs,)
