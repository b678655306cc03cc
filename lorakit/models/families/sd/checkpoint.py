"""Where the parts of a Stable Diffusion model are stored, whichever way it is stored. Reads no weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

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
    sd2_text_settings,
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
from lorakit.models.weights.folders import TensorRef, TensorSlice, TransposedTensor, fetched, part_config

_FAMILY = "Stable Diffusion"
_OPEN_CLIP_ROOTS = ("transformer.resblocks.", "token_embedding.", "positional_embedding", "ln_final.")
_OPEN_CLIP_PROJECTION = "text_projection"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
"""What a folder's tokenizer may consist of; one of the first two is there if it has one."""

_TITLES = ("modelspec.architecture", "modelspec.title", "ss_base_model_version")
_SCALES = {0.18215: "Stable Diffusion 1.x and 2.x", 0.13025: "Stable Diffusion XL"}


def _vae_renaming(_: str, shapes: Shapes, settings: Settings) -> Callable[[str], str]:
    if any(bare.startswith("encoder.down.") for bare in shapes):
        return partial(layout.original_vae_name, settings=settings)
    return layout.old_vae_name if any(".attentions.0.query." in bare for bare in shapes) else str


def open_clip_tensors(
    tensors: Shapes, prefix: str, *, projected: bool = False
) -> tuple[dict[str, TensorRef], dict[str, tuple[int, ...]]]:
    """Places and shapes of a text encoder in the layout of OpenCLIP, by the names of `open_clip_name`.

    Queries, keys and values are thirds of one tensor. With `projected`, the projection is there, too: OpenCLIP
    multiplies by it from the right, a linear layer by its transpose.
    """
    places: dict[str, TensorRef] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for full, shape in tensors.items():
        bare = full.removeprefix(prefix)
        if bare == full:
            continue
        if projected and bare.removesuffix(".weight") == _OPEN_CLIP_PROJECTION:
            # With `.weight`, tools have written it as a linear layer has it.
            transposed = bare == _OPEN_CLIP_PROJECTION
            places[f"{_OPEN_CLIP_PROJECTION}.weight"] = TransposedTensor(full) if transposed else full
            shapes[f"{_OPEN_CLIP_PROJECTION}.weight"] = shape[::-1] if transposed else shape
        elif not bare.startswith(_OPEN_CLIP_ROOTS):
            continue
        elif ".in_proj_" in bare and shape and shape[0] % 3 == 0:
            rows = shape[0] // 3
            for third in range(3):
                places[f"{bare}[{third}]"] = TensorSlice(full, third * rows, (third + 1) * rows)
                shapes[f"{bare}[{third}]"] = (rows, *shape[1:])
        else:
            places[bare], shapes[bare] = full, shape
    return places, shapes


def _sd2_text_encoder(file: Path, tensors: Shapes) -> CheckpointPart | None:
    """OpenCLIP's text encoder without the last layer, for which 2.x has no use; None where there is none."""
    places, shapes = open_clip_tensors(tensors, layout.OPEN_CLIP_PREFIX)
    if not places:
        return None
    settings = _TEXT_FORMAT.inferred(file, shapes, sd2_text_settings)
    unread = f"transformer.resblocks.{settings['num_hidden_layers']}."
    read = [bare for bare in places if not bare.startswith(unread)]
    places, shapes = {bare: places[bare] for bare in read}, {bare: shapes[bare] for bare in read}
    return CheckpointPart(_TEXT_FORMAT, file, settings, places, shapes, layout.open_clip_name)


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
    other_layout=_sd2_text_encoder,
)
FORMATS: Mapping[str, PartFormat] = {part.name: part for part in (_UNET_FORMAT, _VAE_FORMAT, _TEXT_FORMAT)}
"""The parts of Stable Diffusion 1.x and 2.x, by name."""


@frozen
class SDCheckpoint(ModelCheckpoint):
    """A Stable Diffusion model, a single file or a diffusers folder, on disk or on the Hub."""

    formats = FORMATS
    title: ClassVar[str] = "Stable Diffusion 1.x and 2.x"
    """What messages call the family's models."""
    text_encoders: ClassVar[tuple[str, ...]] = (TEXT_ENCODER.name,)
    """The parts with text encoders."""
    scaling_factor: ClassVar[float] = SCALING_FACTOR
    """What latents are multiplied by."""
    foreign_titles: ClassVar[re.Pattern[str]] = re.compile(r"sd[-_ ]?xl|diffusion[-_ ]xl", re.IGNORECASE)
    """Matches titles in headers of files with VAEs of other latents."""

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
        unet, encoders = self.part("unet"), [self.part(name) for name in self.text_encoders]
        taken, given = unet.settings.get("cross_attention_dim"), [part.settings.get("hidden_size") for part in encoders]
        if taken != sum(width for width in given if isinstance(width, int)):
            gives = "the text encoder gives" if len(given) == 1 else "the text encoders give"
            widths = " and ".join(map(str, given))
            raise ModelError(f"{self.location}: the U-Net takes {taken} channels of text, {gives} {widths}")
        for part in (unet, *encoders):
            part.check()

    def check_vae(self) -> None:
        """A `ModelError` unless the VAE is there, whole, and makes latents of the right shape.

        Of a VAE on the Hub only the config is looked at; that of a Hub model passes.
        """
        if isinstance(self.vae, HubModel):
            self._check_latents(part_config(self.vae, "vae", "VAE"), self.vae)
        elif self.vae is not None or not isinstance(self.location, HubModel):
            part = self.part("vae")
            self._check_latents(part.settings, part)
            part.check()

    def strange_vae(self) -> str:
        """Why the VAE's latents are not those of the family's models, as far as files say it; or nothing."""
        location = self.location if self.vae is None else self.vae
        if isinstance(location, HubModel) or os.path.isdir(location):  # noqa: PTH112 - `Path.is_dir` may raise
            own = self.vae is None
            settings = self.summary.configs.get("vae", {}) if own else part_config(location, "vae", "VAE")
            return self._other_scale(settings)
        return "" if self.vae is None else self._other_latents(summarize(location))

    def tokenizer_folder(self, name: str = "tokenizer") -> Path | None:
        """The folder of that name with the model's own tokenizer, or None if it brings none."""
        if self.summary.kind != "folder":
            return None
        folder = fetched(self.location, [f"{name}/{file}" for file in TOKENIZER_FILES]) / name
        return folder if any((folder / file).is_file() for file in TOKENIZER_FILES[:2]) else None

    def _check_latents(self, settings: Mapping[str, Any], what: object) -> None:
        """A `ModelError` that names `what` if a VAE with these settings makes latents of another shape."""
        kind, channels = settings.get("_class_name", "AutoencoderKL"), settings.get("latent_channels", LATENT_CHANNELS)
        if kind != "AutoencoderKL":
            raise ModelError(f"{what} is of the class {kind!s:.80}; {self.title} takes an AutoencoderKL")
        if channels != LATENT_CHANNELS:
            raise ModelError(f"{what} makes latents of {channels!s:.80} channels; the U-Net takes {LATENT_CHANNELS}")
        levels = settings.get("block_out_channels")
        if isinstance(levels, list) and levels and len(levels) < 9 and 2 ** (len(levels) - 1) != DOWNSCALING:
            factor = 2 ** (len(levels) - 1)
            raise ModelError(f"{what} makes latents {factor} times smaller than images; the U-Net takes {DOWNSCALING}")

    def _other_scale(self, settings: Mapping[str, Any]) -> str:
        """Why a VAE with these settings is one of another latent space; empty where they do not show it."""
        factor = settings.get("scaling_factor", self.scaling_factor)
        if not isinstance(factor, int | float) or abs(factor - self.scaling_factor) < 1e-3:
            return ""
        known = next((f", which is that of {title}" for own, title in _SCALES.items() if abs(factor - own) < 1e-4), "")
        return f"its scaling_factor is {factor}{known}, not {self.scaling_factor}"

    def _other_latents(self, summary: CheckpointSummary) -> str:
        """Why a file's VAE is one of another latent space; empty where the file does not say it."""
        traits = traits_of(summary)
        if traits is not None and (traits.version == "XL") != (self.scaling_factor != SCALING_FACTOR):
            return f"it is that of {recognise(summary).title}"
        title = next((key for key in _TITLES if self.foreign_titles.search(summary.metadata.get(key, ""))), None)
        return f"its header has {title} = {summary.metadata[title]:.80}" if title else ""
