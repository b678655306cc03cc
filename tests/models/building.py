"""Builds Stable Diffusion from a path, without a config."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakit.models.families.sd.checkpoint import SDCheckpoint
from lorakit.models.families.sd.model import StableDiffusion, Variant

CPU = torch.device("cpu")


def stable_diffusion(
    path: Path, dtype: torch.dtype = torch.float32, vae: Path | None = None, **options: object
) -> StableDiffusion:
    """The model at a path, on the CPU; options are those of `Variant`, by default those of 1.x."""
    named = {"version": "sd_v1", "architecture": "stable-diffusion-v1/lora"}
    variant = Variant(**{**named, **options})  # type: ignore[arg-type]
    return StableDiffusion(SDCheckpoint(path, vae), variant, CPU, dtype)


def read(model: StableDiffusion, part: str) -> object:
    """A part of the model, `denoiser`, `text_encoder` or `vae_encoder`, read if it is not yet."""
    return getattr(model, part)
