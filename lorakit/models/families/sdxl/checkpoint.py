"""Where the parts of a Stable Diffusion XL model are stored, whichever way it is stored. Reads no weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from lorakit.checkpoints import HubModel, Shapes
from lorakit.errors import ModelError
from lorakit.models.families.sd import checkpoint as sd
from lorakit.models.families.sd import state_dict_keys as layout
from lorakit.models.families.sd.infer_config import clip_settings, open_clip_settings
from lorakit.models.families.sd.structure import projected_clip_shapes
from lorakit.models.families.sd.unet_config import UNetConfig
from lorakit.models.families.sdxl.parts import STRUCTURE, TEXT_ENCODER_1, TEXT_ENCODER_2
from lorakit.models.weights.checkpoint import CheckpointPart

_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."


def _projected_settings(shapes: Shapes) -> dict[str, Any]:
    """Settings of the second text encoder in the names of transformers."""
    projection = shapes["text_projection.weight"][0]
    return {**clip_settings(shapes), "hidden_act": "gelu", "projection_dim": projection}


def _big_g(file: Path, tensors: Shapes) -> CheckpointPart | None:
    """The second text encoder in the layout of OpenCLIP; None where there is none."""
    places, shapes = sd.open_clip_tensors(tensors, _OPEN_CLIP_PREFIX, projected=True)
    if not places:
        return None
    settings = _TEXT_2_FORMAT.inferred(file, shapes, open_clip_settings)
    settings["projection_dim"] = shapes.get("text_projection.weight", (settings["hidden_size"],))[0]
    return CheckpointPart(_TEXT_2_FORMAT, file, settings, places, shapes, layout.open_clip_name)


_TEXT_1_FORMAT = evolve(
    sd.FORMATS["text_encoder"],
    title=TEXT_ENCODER_1.title,
    prefix="conditioner.embedders.0.transformer.",
    other_layout=lambda _file, _shapes: None,
)
_TEXT_2_FORMAT = evolve(
    _TEXT_1_FORMAT,
    name=TEXT_ENCODER_2.name,
    title=TEXT_ENCODER_2.title,
    prefix="conditioner.embedders.1.transformer.",
    roots=(*_TEXT_1_FORMAT.roots, "text_projection."),
    infer=_projected_settings,
    shapes=projected_clip_shapes,
    other_layout=_big_g,
)


@frozen
class SDXLCheckpoint(sd.SDCheckpoint):
    """A Stable Diffusion XL model, a single file or a diffusers folder, on disk or on the Hub."""

    formats = {  # noqa: RUF012 - a ClassVar of the base
        "unet": sd.FORMATS["unet"],
        "vae": sd.FORMATS["vae"],
        TEXT_ENCODER_1.name: _TEXT_1_FORMAT,
        TEXT_ENCODER_2.name: _TEXT_2_FORMAT,
    }
    title = "Stable Diffusion XL"
    text_encoders = (TEXT_ENCODER_1.name, TEXT_ENCODER_2.name)
    scaling_factor = 0.13025
    foreign_titles = re.compile(r"sd[-_ ]?v?[12]|diffusion[-_ ]v?[12]", re.IGNORECASE)

    def check(self) -> None:
        """A `ModelError` unless U-Net and text encoders are there, whole, of SDXL's structure, and fit together."""
        super().check()
        if isinstance(self.location, HubModel):
            return
        unet = self.part("unet")
        settings = UNetConfig.of(unet.settings)
        for key, value in STRUCTURE.items():
            found = getattr(settings, key)
            if (list(found) if isinstance(found, tuple) else found) != value:
                raise ModelError(f"{unet} has {key} = {found}, and SDXL has {value}; it is of another kind")

    def part(self, name: str) -> CheckpointPart:
        """Where a part is; the VAE's latents have SDXL's scale, whatever its config says."""
        part = super().part(name)
        if name != "vae":
            return part
        return evolve(part, settings={**part.settings, "scaling_factor": self.scaling_factor})
