"""Where the parts of a flow-matching model are stored: in one file, in a folder, or each in a file of its own.

Reads no weights, imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from attrs import field, frozen

from lorakit.checkpoints import HubModel, Location, Shapes
from lorakit.errors import ModelError
from lorakit.models.families.sd import state_dict_keys
from lorakit.models.families.sd.infer_config import vae_settings
from lorakit.models.families.sd.structure import vae_shapes
from lorakit.models.weights.checkpoint import DIFFUSERS_FILES, CheckpointPart, ModelCheckpoint, PartFormat, Settings
from lorakit.models.weights.folders import fetched

TRANSFORMER = "transformer"
"""The name of the denoiser among the parts, and of its folder."""
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "")
"""What the names of a transformer's tensors may begin with in single files."""
LATENT_CHANNELS, DOWNSCALING = 16, 8
"""Channels of latents, and how many times smaller than images they are."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
"""What a tokenizer's folder has one of."""
TOKENIZER_FILES = (
    *_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
"""What a tokenizer's folder may hold."""


def _renaming(_: str, shapes: Shapes, settings: Settings) -> Callable[[str], str]:
    is_original = any(bare.startswith("encoder.down.") for bare in shapes)
    return partial(state_dict_keys.original_vae_name, settings=settings) if is_original else str


def flux_vae_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `AutoencoderKL` for the VAE of FLUX.1, whose latents have a mean and a scale."""
    projections = {f"use_{name}": f"{name}.weight" in shapes for name in ("quant_conv", "post_quant_conv")}
    return {**vae_settings(shapes), **projections, "scaling_factor": 0.3611, "shift_factor": 0.1159}


def flux_vae_format(family: str) -> PartFormat:
    """The VAE of FLUX.1 in files of a family; it is Z-Image's and Chroma's, too."""
    return PartFormat(
        name="vae",
        title="VAE",
        family=family,
        files=DIFFUSERS_FILES,
        prefix="vae.",
        other_prefixes=("first_stage_model.",),
        roots=("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
        infer=flux_vae_settings,
        shapes=vae_shapes,
        renaming=_renaming,
    )


@frozen
class FlowCheckpoint(ModelCheckpoint):
    """A model whose parts may each have a location of their own."""

    channels_setting: ClassVar[tuple[str, int]] = ("latent_channels", 4)
    """The setting of the VAE with the channels of its latents, and what they are where it is absent."""

    separate: Mapping[str, Location] = field(factory=dict)
    """Where parts are that are not taken from the model itself, by name."""
    tokenizers: Mapping[str, Location] = field(factory=dict)
    """Where tokenizers are that are not taken from the model itself, by the name of their folder in one."""

    def lacking(self) -> list[str]:
        """The parts that are neither in the model nor at a location of their own, as far as headers tell."""
        return [name for name in self.formats if name not in self.separate and self.lacks(name)]

    def lacks(self, name: str) -> bool:
        """Whether the model comes without a part, as far as headers or configs tell."""
        return not self._is_alone(name) and super().lacks(name)

    def part(self, name: str) -> CheckpointPart:
        """Where a part is; of a Hub model, the part's files are fetched. A `ModelError` if it is not there."""
        if name not in self.separate and self._is_alone(name):
            return self.formats[name].alone(self.location)
        return super().part(name)

    def _is_alone(self, name: str) -> bool:
        """Whether the model is a folder with nothing but this part: the transformer."""
        return name == TRANSFORMER and "config" in self.summary.configs

    def check_part(self, name: str) -> None:
        """A `ModelError` unless a part is there and whole; one on the Hub passes."""
        if isinstance(self.separate.get(name, self.location), HubModel):
            return
        part = self.part(name)
        if name == "vae":
            channels = part.settings.get(*self.channels_setting)
            if channels != LATENT_CHANNELS:
                raise ModelError(f"{part} makes latents of {channels!s:.80} channels, not {LATENT_CHANNELS}")
        part.check()

    def tokenizer_folder(self, name: str) -> Path | None:
        """The folder with a tokenizer, which is called `name` in models; None if there is none."""
        own = self.tokenizers.get(name)
        if own is None and self.summary.kind != "folder":
            return None
        location = own or self.location
        if isinstance(location, Path) and location.is_file():
            return location.parent
        for folder in ("", f"{name}/") if own else (f"{name}/",):
            root = fetched(location, [folder + file for file in TOKENIZER_FILES]) / folder
            if any((root / file).is_file() for file in _VOCABULARIES):
                return root
        return None
