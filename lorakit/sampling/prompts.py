"""Prompts: what to draw, and how. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import field, frozen
from attrs import validators as v

from lorakit.randomness import derived_seed
from lorakit.sampling.samplers import SamplerName, missing_package

MOST_STEPS = 999
"""Most steps of a picture: samplers have a thousand timesteps to choose from, and leave one of them out."""

SEEDS = 2**32
"""How many seeds there are to be made: those that web UIs take too."""


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
    """What to lead the pictures away from."""
    width: int = field(default=512, converter=_whole_latents, validator=v.ge(1))
    """Width in pixels, rounded down to a multiple of 8, at least 64."""
    height: int = field(default=512, converter=_whole_latents, validator=v.ge(1))
    """Height in pixels, rounded down to a multiple of 8, at least 64."""
    steps: int = field(default=30, validator=[v.ge(1), v.le(MOST_STEPS)])
    """Steps of the sampler."""
    scale: float = field(default=7.5, validator=v.ge(0))
    """Scale of classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598); up to 1 there is none, and no negative
    prompt."""
    seed: int | None = field(default=None, validator=v.optional(v.ge(0)))
    """Seed of the noise; when absent, each prompt gets one from `training.seed`, the same at each preview."""
    sampler: SamplerName = field(default="ddim", validator=_installed)
    """The rule that leads from noise to picture."""


@frozen(kw_only=True)
class Prompt(PromptSettings):
    """A picture to draw."""

    prompt: str = field(validator=v.min_len(1))
    """What is to be seen."""


@frozen(kw_only=True)
class Picture:
    """A picture to draw, with the noise that it starts from settled."""

    prompt: Prompt
    seed: int
    """Seed of the noise: the prompt's own, or one made for it."""


def with_seeds(prompts: Iterable[Prompt], seed: int) -> list[Picture]:
    """The pictures of prompts; those without a seed of their own get one from the run's seed and their place."""
    pictures = []
    for index, prompt in enumerate(prompts):
        made = derived_seed(seed, "preview", index) % SEEDS
        pictures.append(Picture(prompt=prompt, seed=made if prompt.seed is None else prompt.seed))
    return pictures
