"""Whether a VAE makes the latents that Stable Diffusion 1.x and 2.x were trained on, as far as its files say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorakit.checkpoints import CheckpointSummary
from lorakit.errors import ModelError
from lorakit.models.families.sd.detect import recognise, traits_of
from lorakit.models.families.sd.infer_config import DOWNSCALING, LATENT_CHANNELS, SCALING_FACTOR

_TITLES = ("modelspec.architecture", "modelspec.title", "ss_base_model_version")
_XL = re.compile(r"sd[-_ ]?xl|diffusion[-_ ]xl", re.IGNORECASE)


def check_latents(settings: Mapping[str, Any], what: object) -> None:
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


def other_scale(settings: Mapping[str, Any]) -> str:
    """Why a VAE with these settings is one of another latent space; empty where they do not show it."""
    factor = settings.get("scaling_factor", SCALING_FACTOR)
    if not isinstance(factor, int | float) or abs(factor - SCALING_FACTOR) < 1e-3:
        return ""
    known = ", which is that of Stable Diffusion XL" if abs(factor - 0.13025) < 1e-4 else ""
    return f"its scaling_factor is {factor}{known}, not {SCALING_FACTOR}"


def other_latents(summary: CheckpointSummary) -> str:
    """Why a file's VAE is one of another latent space; empty where the file does not say it."""
    traits = traits_of(summary)
    if traits is not None and traits.version == "XL":
        return f"it is that of {recognise(summary).title}"
    title = next((key for key in _TITLES if _XL.search(summary.metadata.get(key, ""))), None)
    return f"its header has {title} = {summary.metadata[title]:.80}" if title else ""
