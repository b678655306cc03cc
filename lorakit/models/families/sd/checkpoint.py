"""Where the parts of a Stable Diffusion model are stored, whichever way it is stored. Reads no weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.checkpoints import CheckpointSummary, HubModel, Location, Shapes, summarize
from lorakit.errors import ModelError
from lorakit.models.families.sd import state_dict_keys as layout
from lorakit.models.families.sd.detect import recognise, traits_of
from lorakit.models.families.sd.infer_config import (
    DOWNSCALING,
    LATENT_CHANNELS,
    SCALING_FACTOR,
    clip_settings,
    open_clip_settings,
    unet_settings,
    vae_settings,
)
from lorakit.models.families.sd.state_dict_keys import TEXT_ENCODER, UNET
from lorakit.models.families.sd.structure import clip_shapes, unet_shapes, vae_shapes
from lorakit.models.weights.checkpoint import (
    DIFFUSERS_FILES,
    TRANSFORMERS_FILES,
    CheckpointPart,
    ModelCheckpoint,
    PartFormat,
    Settings,
)
from lorakit.models.weights.folders import TensorRef, TensorSlice, fetched, part_config

_FAMILY = "Stable Diffusion"
_OPEN_CLIP_ROOTS = ("transformer.resblocks.", "token_embedding.", "positional_embedding", "ln_final.")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
"""What a folder's tokenizer may consist of; one of the first two is there if it has one."""

_TITLES = ("modelspec.architecture", "modelspec.title", "ss_base_model_version")
_XL = re.compile(r"sd[-_ ]?xl|diffusion[-_ ]xl", re.IGNORECASE)


def _vae_renaming(_: str, shapes: Shapes, settings: Settings) -> Callable[[str], str]:
    if any(bare.startswith("encoder.down.") for bare in shapes):
        return partial(layout.original_vae_name, settings=settings)
    return layout.old_vae_name if any(".attentions.0.query." in bare for bare in shapes) else str


def _open_clip_part(file: Path, tensors: Shapes) -> CheckpointPart | None:
    """The text encoder in the layout of OpenCLIP, without what Stable Diffusion has no use for; None if it is not."""
    places: dict[str, TensorRef] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for full, shape in tensors.items():
        bare = full.removeprefix(layout.OPEN_CLIP_PREFIX)
        if bare == full or not bare.startswith(_OPEN_CLIP_ROOTS):
            continue
        if ".in_proj_" in bare and shape and shape[0] % 3 == 0:
            rows = shape[0] // 3
            for third in range(3):
                places[f"{bare}[{third}]"] = TensorSlice(full, third * rows, (third + 1) * rows)
                shapes[f"{bare}[{third}]"] = (rows, *shape[1:])
        else:
            places[bare], shapes[bare] = full, shape
    if not places:
        return None
    settings = FORMATS["text_encoder"].inferred(file, shapes, open_clip_settings)
    unread = f"transformer.resblocks.{settings['num_hidden_layers']}."
    read = [bare for bare in places if not bare.startswith(unread)]
    places, shapes = {bare: places[bare] for bare in read}, {bare: shapes[bare] for bare in read}
    return CheckpointPart(FORMATS["text_encoder"], file, settings, places, shapes, layout.open_clip_name)


_UNET_FORMAT = PartFormat(
    name="unet",
    title=UNET.title,
    family=_FAMILY,
    files=DIFFUSERS_FILES,
    prefix=layout.UNET_PREFIX,
    roots=("",),
    infer=unet_settings,
    shapes=unet_shapes,
    renaming=lambda prefix, _, settings: partial(layout.original_unet_name, settings=settings) if prefix else str,
)
_VAE_FORMAT = PartFormat(
    name="vae",
    title="VAE",
    family=_FAMILY,
    files=DIFFUSERS_FILES,
    prefix=layout.VAE_PREFIX,
    roots=("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    infer=vae_settings,
    shapes=vae_shapes,
    renaming=_vae_renaming,
)
_TEXT_FORMAT = PartFormat(
    name="text_encoder",
    title=TEXT_ENCODER.title,
    family=_FAMILY,
    files=TRANSFORMERS_FILES,
    prefix=layout.TEXT_PREFIX,
    inner_prefix="text_model.",
    roots=("embeddings.", "encoder.", "final_layer_norm."),
    infer=clip_settings,
    shapes=clip_shapes,
    other_layout=_open_clip_part,
)
FORMATS: Mapping[str, PartFormat] = {part.name: part for part in (_UNET_FORMAT, _VAE_FORMAT, _TEXT_FORMAT)}
"""The parts of Stable Diffusion 1.x and 2.x, by name."""


@frozen
class SDCheckpoint(ModelCheckpoint):
    """A Stable Diffusion model, a single file or a diffusers folder, on disk or on the Hub."""

    formats = FORMATS

    vae: Location | None = None
    """A VAE to use instead of the model's own: a file, or a diffusers folder."""

    @property
    def separate(self) -> Mapping[str, Location]:
        """Where the VAE is, unless it is the model's own."""
        return {} if self.vae is None else {"vae": self.vae}

    def check(self) -> None:
        """A `ModelError` unless U-Net and text encoder are there, whole, and fit together; a Hub model passes."""
        if isinstance(self.location, HubModel):
            return
        unet, text_encoder = self.part("unet"), self.part("text_encoder")
        taken, given = unet.settings.get("cross_attention_dim"), text_encoder.settings.get("hidden_size")
        if taken != given:
            raise ModelError(
                f"{self.location}: the U-Net takes {taken} channels of text, the text encoder gives {given}"
            )
        unet.check()
        text_encoder.check()

    def check_vae(self) -> None:
        """A `ModelError` unless the VAE is there, whole, and makes latents of the right shape.

        Of a VAE on the Hub only the config is looked at; that of a Hub model passes.
        """
        if isinstance(self.vae, HubModel):
            _check_latents(part_config(self.vae, "vae", "VAE"), self.vae)
        elif self.vae is not None or not isinstance(self.location, HubModel):
            part = self.part("vae")
            _check_latents(part.settings, part)
            part.check()

    def strange_vae(self) -> str:
        """Why the VAE's latents are not those of Stable Diffusion 1.x and 2.x, as far as files say it; or nothing."""
        location = self.location if self.vae is None else self.vae
        if isinstance(location, HubModel) or os.path.isdir(location):  # noqa: PTH112 - `Path.is_dir` may raise
            own = self.vae is None
            return _other_scale(self.summary.configs.get("vae", {}) if own else part_config(location, "vae", "VAE"))
        return "" if self.vae is None else _other_latents(summarize(location))

    def tokenizer_folder(self) -> Path | None:
        """The folder with the model's own tokenizer, or None if it brings none."""
        if self.summary.kind != "folder":
            return None
        folder = fetched(self.location, [f"tokenizer/{file}" for file in TOKENIZER_FILES]) / "tokenizer"
        return folder if any((folder / file).is_file() for file in TOKENIZER_FILES[:2]) else None


def _check_latents(settings: Mapping[str, Any], what: object) -> None:
    """A `ModelError` that names `what` if a VAE with these settings makes latents of another shape."""
    kind, channels = settings.get("_class_name", "AutoencoderKL"), settings.get("latent_channels", LATENT_CHANNELS)
    if kind != "AutoencoderKL":
        raise ModelError(f"{what} is of the class {kind!s:.80}; Stable Diffusion 1.x and 2.x take an AutoencoderKL")
    if channels != LATENT_CHANNELS:
        raise ModelError(f"{what} makes latents of {channels!s:.80} channels; the U-Net takes {LATENT_CHANNELS}")
    levels = settings.get("block_out_channels")
    if isinstance(levels, list) and levels and len(levels) < 9 and 2 ** (len(levels) - 1) != DOWNSCALING:
        factor = 2 ** (len(levels) - 1)
        raise ModelError(f"{what} makes latents {factor} times smaller than images; the U-Net takes {DOWNSCALING}")


def _other_scale(settings: Mapping[str, Any]) -> str:
    """Why a VAE with these settings is one of another latent space; empty where they do not show it."""
    factor = settings.get("scaling_factor", SCALING_FACTOR)
    if not isinstance(factor, int | float) or abs(factor - SCALING_FACTOR) < 1e-3:
        return ""
    known = ", which is that of Stable Diffusion XL" if abs(factor - 0.13025) < 1e-4 else ""
    return f"its scaling_factor is {factor}{known}, not {SCALING_FACTOR}"


def _other_latents(summary: CheckpointSummary) -> str:
    """Why a file's VAE is one of another latent space; empty where the file does not say it."""
    traits = traits_of(summary)
    if traits is not None and traits.version == "XL":
        return f"it is that of {recognise(summary).title}"
    title = next((key for key in _TITLES if _XL.search(summary.metadata.get(key, ""))), None)
    return f"its header has {title} = {summary.metadata[title]:.80}" if title else ""
