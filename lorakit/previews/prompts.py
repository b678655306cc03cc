"""Prompts: what to draw, and how. Importing this imports no torch."""

from __future__ import annotations

from attrs import field, frozen
from attrs import validators as v

from lorakit.diffusion.samplers import SamplerName, missing_package

LARGEST_SIDE = 4096
"""Most pixels of a preview's side: larger ones are typing errors, and would take hours."""
MOST_STEPS = 999
"""Most steps of a picture: samplers have a thousand timesteps to choose from, and remove one of them."""


def _whole_latents(pixels: int) -> int:
    return max(64, pixels // 8 * 8)


def _installed(_: object, __: object, sampler: SamplerName) -> None:
    package = missing_package(sampler)
    if package:
        raise ValueError(f"needs the package {package!r} for {sampler!r}; pip install {package}")


@frozen(kw_only=True)
class PromptSettings:
    """How a picture is drawn."""

    negative_prompt: str = ""
    """Negative prompt."""
    width: int = field(default=512, converter=_whole_latents, validator=v.le(LARGEST_SIDE))
    """Width in pixels, rounded down to a multiple of 8, at least 64."""
    height: int = field(default=512, converter=_whole_latents, validator=v.le(LARGEST_SIDE))
    """Height in pixels, rounded down to a multiple of 8, at least 64."""
    steps: int = field(default=30, validator=[v.ge(1), v.le(MOST_STEPS)])
    """Number of sampling steps."""
    scale: float = field(default=7.5, validator=v.ge(0))
    """Classifier-free guidance scale (Ho & Salimans, 2022, arXiv:2207.12598); at most 1 disables guidance and the
    negative prompt."""
    seed: int | None = field(default=None, validator=v.optional(v.ge(0)))
    """Seed of the noise; if absent, derived from `training.seed` for each prompt, the same for every preview."""
    sampler: SamplerName = field(default="ddim", validator=_installed)
    """Sampler."""


@frozen(kw_only=True)
class Prompt(PromptSettings):
    """A picture to draw."""

    prompt: str = field(validator=v.min_len(1))
    """What is to be seen."""
