"""The layers of FLUX.1 and Chroma that can be adapted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lorakit.api.components import ModelPart
from lorakit.models.families.flux1.layout import diffusers_layers
from lorakit.models.families.flux1.parts import (
    CLIP,
    LAYOUT,
    TRANSFORMER,
    block_index,
    clip_key,
    t5_key,
    transformer_key,
)
from lorakit.models.families.sd.targets import clip_targets as layers_of_clip
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.folders import TensorSlice

_TAGS = {
    "img_attn": "attention", "txt_attn": "attention", "img_mlp": "mlp", "txt_mlp": "mlp", "img_mod": "modulation",
    "txt_mod": "modulation", "modulation": "modulation",
}  # fmt: skip
_JOINT = {"attention", "mlp"}
"""What the layers of single blocks are, which have both in one."""
_SHARED = re.compile(r"(.*SelfAttention)\.[qkv]|(.*DenseReluDense)\.wi_[01]")


def transformer_targets(root: nn.Module) -> Iterator[AdaptationTarget]:
    """The linear layers of all blocks."""
    for path, layer in root.named_modules():
        index = block_index(path)
        if index is None or not isinstance(layer, nn.Linear):
            continue
        kind = path.split(".")[2]
        tags = {"transformer", *({_TAGS[kind]} if kind in _TAGS else _JOINT)}
        if kind.startswith("txt_"):
            tags.add("text_stream")
        theirs = diffusers_layers(path)
        yield AdaptationTarget(
            key=transformer_key(path),
            part=TRANSFORMER.name,
            root=root,
            path=path,
            tags=frozenset(tags),
            block_index=index,
            layout=LAYOUT,
            diffusers_path=f"transformer.{theirs[0]}" if len(theirs) == 1 else "",
            original_path=f"diffusion_model.{path}",
            fused_from=tuple(_rows(theirs, layer)) if len(theirs) > 1 else (),
        )


def _rows(paths: Sequence[str], layer: nn.Linear) -> Iterator[TensorSlice]:
    """The rows of a layer that each of diffusers' layers has: queries, keys and values as many as there are inputs."""
    width, start = layer.in_features, 0
    for path in paths:
        stop = layer.out_features if path.endswith(".proj_mlp") else start + width
        yield TensorSlice(f"transformer.{path}", start, stop)
        start = stop


def clip_targets(encoder: nn.Module) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of CLIP's text encoder."""
    return layers_of_clip(encoder, CLIP, clip_key)


def t5_targets(part: ModelPart, encoder: nn.Module) -> Iterator[AdaptationTarget]:
    """Projections and MLPs of every layer of T5's encoder."""
    for path, layer in encoder.named_modules():
        if isinstance(layer, nn.Linear) and path.startswith("block."):
            shared = _SHARED.fullmatch(path)
            yield AdaptationTarget(
                key=t5_key(path),
                part=part.name,
                root=encoder,
                path=path,
                tags=frozenset({"text_encoder", "attention" if "SelfAttention" in path else "mlp"}),
                encoder_index=part.encoders[0],
                diffusers_path=f"{part.name}.encoder.{path}",
                shared_input=next(filter(None, shared.groups())) if shared else "",
            )
