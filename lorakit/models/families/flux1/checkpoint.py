"""Where the parts of a FLUX.1 or Chroma are stored, in the original layout and in diffusers'. Imports no torch."""

from __future__ import annotations

from attrs import evolve, frozen

from lorakit.models.families.flow.checkpoint import (
    TRANSFORMER,
    TRANSFORMER_PREFIXES,
    FlowCheckpoint,
    flux_vae_format,
)
from lorakit.models.families.flow.t5 import t5_format
from lorakit.models.families.flux1 import layout
from lorakit.models.families.flux1.parts import CLIP, T5, T5_ALONE
from lorakit.models.families.flux1.settings import infer_settings
from lorakit.models.families.flux1.structure import transformer_shapes
from lorakit.models.families.sd.checkpoint import FORMATS as OF_SD
from lorakit.models.weights.checkpoint import DIFFUSERS_FILES, PartFormat

FAMILY, CHROMA = "FLUX.1", "Chroma"
"""What messages call the families."""


def transformer_format(family: str) -> PartFormat:
    """The transformer in files of a family."""
    return PartFormat(
        name=TRANSFORMER,
        title="transformer",
        family=family,
        files=DIFFUSERS_FILES,
        prefix=TRANSFORMER_PREFIXES[0],
        other_prefixes=TRANSFORMER_PREFIXES[1:],
        roots=(*layout.ORIGINAL_ROOTS, *layout.DIFFUSERS_ROOTS),
        infer=infer_settings,
        shapes=transformer_shapes,
        arrange=layout.arranged,
    )


@frozen
class FluxCheckpoint(FlowCheckpoint):
    """A FLUX.1 in one file, in a diffusers folder, or in files for transformer, text encoders and VAE."""

    formats = {  # noqa: RUF012 - a ClassVar of the base
        TRANSFORMER: transformer_format(FAMILY),
        CLIP.name: evolve(
            OF_SD["text_encoder"],
            title=CLIP.title,
            family=FAMILY,
            prefix="text_encoders.clip_l.transformer.",
            other_layout=lambda _file, _shapes: None,
        ),
        T5.name: t5_format(T5, FAMILY),
        "vae": flux_vae_format(FAMILY),
    }


@frozen
class ChromaCheckpoint(FlowCheckpoint):
    """A Chroma in one file, in a diffusers folder, or in files for transformer, text encoder and VAE."""

    formats = {  # noqa: RUF012 - a ClassVar of the base
        TRANSFORMER: transformer_format(CHROMA),
        T5_ALONE.name: t5_format(T5_ALONE, CHROMA),
        "vae": flux_vae_format(CHROMA),
    }
