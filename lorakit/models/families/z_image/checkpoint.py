"""Where the parts of a Z-Image are stored, in the layouts of diffusers and of the original code. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import frozen

from lorakit.checkpoints import Shapes
from lorakit.models.families.flow.checkpoint import (
    TRANSFORMER,
    TRANSFORMER_PREFIXES,
    FlowCheckpoint,
    flux_vae_format,
)
from lorakit.models.families.flow.qwen3 import QWEN3, qwen3_format
from lorakit.models.weights.checkpoint import DIFFUSERS_FILES, PartFormat, Places, Settings
from lorakit.models.weights.counting import count
from lorakit.models.weights.folders import TensorRef, TensorSlice

FAMILY = "Z-Image"
"""What messages call the family."""
_ROOTS = (
    "layers.", "noise_refiner.", "context_refiner.", "x_embedder.", "all_x_embedder.", "final_layer.",
    "all_final_layer.", "t_embedder.", "cap_embedder.", "x_pad_token", "cap_pad_token",
)  # fmt: skip
_RENAMED = (
    ("all_x_embedder.2-1.", "x_embedder."), ("all_final_layer.2-1.", "final_layer."),
    (".attention.q_norm.", ".attention.norm_q."), (".attention.k_norm.", ".attention.norm_k."),
    (".attention.out.", ".attention.to_out.0."),
)  # fmt: skip
"""Parts of names in diffusers' and the original layout, and what the module has for them."""
_FUSED = ".attention.qkv.weight"


def arranged(places: Places, shapes: Shapes) -> tuple[Places, Shapes]:
    """Places and shapes by the names of the module; queries, keys and values are thirds of one tensor in files."""
    found: dict[str, TensorRef] = {}
    sides: dict[str, tuple[int, ...]] = {}
    for bare, place in places.items():
        if bare.endswith(_FUSED) and isinstance(place, str):
            rows = shapes[bare][0] // 3
            for index, name in enumerate(("to_q", "to_k", "to_v")):
                own = bare.replace(_FUSED, f".attention.{name}.weight")
                found[own] = TensorSlice(place, index * rows, (index + 1) * rows)
                sides[own] = (rows, *shapes[bare][1:])
            continue
        name = bare
        for there, here in _RENAMED:
            name = name.replace(there, here)
        found[name], sides[name] = place, shapes[bare]
    return found, sides


def transformer_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `ZImageTransformer2DModel` for the tensors of a transformer, by the names of the module."""
    width, channels = shapes["x_embedder.weight"]
    (head,) = shapes["layers.0.attention.norm_q.weight"]
    return {
        "in_channels": channels // 4,
        "dim": width,
        "n_layers": count(shapes, "layers.{}."),
        "n_refiner_layers": count(shapes, "noise_refiner.{}."),
        "n_heads": width // head,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        # A quarter for the frame, of which there is one; the rest for rows and columns.
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
    }


def transformer_shapes(settings: Settings) -> Shapes:
    """The tensors of a transformer with these settings. Raises ValueError for settings that no Z-Image has."""
    return dict(_tensors(settings))


def _tensors(settings: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, caption = settings.get("dim", 3840), settings.get("cap_feat_dim", 2560)
    channels, time = 4 * settings.get("in_channels", 16), min(width, 256)
    if settings.get("siglip_feat_dim"):
        raise ValueError("it has an image encoder, as Z-Image-Omni has")
    for name, outputs, inputs in (
        ("x_embedder", width, channels), ("t_embedder.mlp.0", 1024, 256), ("t_embedder.mlp.2", time, 1024),
        ("cap_embedder.1", width, caption), ("final_layer.linear", channels, width),
        ("final_layer.adaLN_modulation.1", width, time),
    ):  # fmt: skip
        yield f"{name}.weight", (outputs, inputs)
        yield f"{name}.bias", (outputs,)
    yield "cap_embedder.0.weight", (caption,)
    for name in ("x_pad_token", "cap_pad_token"):
        yield name, (1, width)
    refiners = settings.get("n_refiner_layers", 2)
    groups = {"layers": settings.get("n_layers", 30), "noise_refiner": refiners, "context_refiner": refiners}
    for group, blocks in groups.items():
        for index in range(blocks):
            yield from _block(f"{group}.{index}", settings, modulated=group != "context_refiner")


def _block(path: str, settings: Settings, modulated: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, heads = settings.get("dim", 3840), settings.get("n_heads", 30)
    hidden, time = int(width / 3 * 8), min(width, 256)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{path}.attention.{name}.weight", (width, width)
    for name in ("norm_q", "norm_k"):
        yield f"{path}.attention.{name}.weight", (width // heads,)
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield f"{path}.{name}.weight", (width,)
    for name, outputs, inputs in (("w1", hidden, width), ("w2", width, hidden), ("w3", hidden, width)):
        yield f"{path}.feed_forward.{name}.weight", (outputs, inputs)
    if modulated:
        yield f"{path}.adaLN_modulation.0.weight", (4 * width, time)
        yield f"{path}.adaLN_modulation.0.bias", (4 * width,)


@frozen
class ZImageCheckpoint(FlowCheckpoint):
    """A Z-Image in one file, in a diffusers folder, or in files for transformer, text encoder and VAE."""

    formats = {  # noqa: RUF012 - a ClassVar of the base
        TRANSFORMER: PartFormat(
            name=TRANSFORMER,
            title="transformer",
            family=FAMILY,
            files=DIFFUSERS_FILES,
            prefix=TRANSFORMER_PREFIXES[0],
            other_prefixes=TRANSFORMER_PREFIXES[1:],
            roots=_ROOTS,
            infer=transformer_settings,
            shapes=transformer_shapes,
            arrange=arranged,
        ),
        QWEN3.name: qwen3_format(FAMILY, "text_encoders.qwen3_4b.transformer."),
        "vae": flux_vae_format(FAMILY),
    }
