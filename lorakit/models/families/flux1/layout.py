"""Names of the transformer's tensors and layers, in the original code and in diffusers; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorakit.checkpoints import Shapes
from lorakit.models.weights.checkpoint import Places
from lorakit.models.weights.folders import JoinedTensors, TensorRef, TensorSlice

_TOP: Mapping[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **{
        f"{own}.{layer}": (f"time_text_embed.{other}.linear_{number}",)
        for own, other in {
            "time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder",
        }.items()
        for number, layer in enumerate(("in_layer", "out_layer"), 1)
    },
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj",),
    "distilled_guidance_layer.out_proj": ("distilled_guidance_layer.out_proj",),
}  # fmt: skip
_IN_BLOCKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "double_blocks": {
        "img_mod.lin": ("norm1.linear",),
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn.norm.query_norm": ("attn.norm_q",),
        "img_attn.norm.key_norm": ("attn.norm_k",),
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mod.lin": ("norm1_context.linear",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.norm.query_norm": ("attn.norm_added_q",),
        "txt_attn.norm.key_norm": ("attn.norm_added_k",),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    "single_blocks": {
        "modulation.lin": ("norm.linear",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "norm.query_norm": ("attn.norm_q",),
        "norm.key_norm": ("attn.norm_k",),
    },
    "distilled_guidance_layer.layers": {"in_layer": ("linear_1",), "out_layer": ("linear_2",)},
    "distilled_guidance_layer.norms": {"": ("",)},
}
_BLOCKS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "distilled_guidance_layer.layers": "distilled_guidance_layer.layers",
    "distilled_guidance_layer.norms": "distilled_guidance_layer.norms",
}
_PATH = re.compile(rf"({'|'.join(map(re.escape, _BLOCKS))})\.(\d+)\.?(.*)")
_THEIR_PATH = re.compile(rf"({'|'.join(map(re.escape, _BLOCKS.values()))})\.(\d+)\.?(.*)")
_OURS: Mapping[str, str] = {theirs: ours for ours, theirs in _BLOCKS.items()}
_NORM = re.compile(r".*_norm|distilled_guidance_layer\.norms\.\d+")
_MARK = "transformer_blocks."
"""What names of blocks have in them in diffusers' layout alone."""
_SWAPPED = "final_layer.adaLN_modulation.1"
"""The layer that gives shift and scale, in diffusers scale and shift."""

ORIGINAL_ROOTS = (
    "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "double_blocks.", "single_blocks.", "final_layer.",
    "distilled_guidance_layer.",
)  # fmt: skip
"""What names of tensors begin with in the original code."""
DIFFUSERS_ROOTS = (
    "x_embedder.", "context_embedder.", "time_text_embed.", "transformer_blocks.", "single_transformer_blocks.",
    "norm_out.", "proj_out.", "distilled_guidance_layer.",
)  # fmt: skip
"""What they begin with in diffusers."""


def diffusers_layers(path: str) -> tuple[str, ...]:
    """What diffusers calls a layer, by its path in the original code: one path, or several whose rows it has.

    Raises KeyError for a layer that there is not.
    """
    found = _PATH.fullmatch(path)
    if found is None:
        return _TOP[path]
    blocks, number, layer = found.groups()
    return tuple(f"{_BLOCKS[blocks]}.{number}.{own}".rstrip(".") for own in _IN_BLOCKS[blocks][layer])


def arranged(places: Places, shapes: Shapes) -> tuple[Places, Shapes]:
    """Places and shapes by the names of the original layout, of those of either layout; unknown names stay."""
    if not any(_MARK in name for name in places):
        names = {_with_scale(name): name for name in places}
        return {own: places[name] for own, name in names.items()}, {own: shapes[name] for own, name in names.items()}
    found: dict[str, dict[int, str]] = {}
    for name in places:
        original, row = _original(name)
        found.setdefault(original, {})[row] = name
    joined: dict[str, TensorRef] = {}
    sides: dict[str, tuple[int, ...]] = {}
    for original, rows in found.items():
        names_of_rows = [rows[row] for row in sorted(rows)]
        stored = tuple(place for own in names_of_rows if isinstance(place := places[own], str))
        first = shapes[names_of_rows[0]]
        sides[original] = (sum(shapes[own][0] for own in names_of_rows), *first[1:])
        joined[original] = stored[0] if len(stored) == 1 else JoinedTensors(stored)
        if original.startswith(_SWAPPED):
            half = first[0] // 2
            joined[original] = JoinedTensors((TensorSlice(stored[0], half, first[0]), TensorSlice(stored[0], 0, half)))
    return joined, sides


def _with_scale(name: str) -> str:
    """Newer tools call the scales of norms weights."""
    layer, _, end = name.rpartition(".")
    return f"{layer}.scale" if end == "weight" and _NORM.fullmatch(layer) else name


def _original(name: str) -> tuple[str, int]:
    """The original name of the tensor that a tensor of diffusers is rows of, and its place there from the top."""
    layer, _, end = name.rpartition(".")
    found = _THEIR_PATH.fullmatch(layer)
    if found is None:
        own, row = _TOP_ORIGINALS.get(layer, (layer, 0))
        return f"{own}.{end}", row
    blocks, number, inner = found.groups()
    ours = _OURS[blocks]
    inner, row = _ORIGINALS[ours].get(inner, (inner, 0))
    return _with_scale(f"{ours}.{number}.{inner}".rstrip(".") + f".{end}"), row


def _inverted(layers: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, int]]:
    return {theirs: (ours, row) for ours, all_of in layers.items() for row, theirs in enumerate(all_of)}


_TOP_ORIGINALS = _inverted(_TOP)
_ORIGINALS = {blocks: _inverted(layers) for blocks, layers in _IN_BLOCKS.items()}
