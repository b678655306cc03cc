"""Prompts: which images to sample, and how. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import field, frozen
from attrs import validators as v
from attrs.converters import optional

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.sampling import SamplerConfig
from lorakit.plugins.catalog import Catalog
from lorakit.utils.rng import derived_seed

LARGEST_SIDE = 4096
"""Most pixels of a preview's side: larger ones are typing errors, and would take hours."""
MOST_STEPS = 999
"""Most steps of an image: samplers have a thousand timesteps to choose from, and leave one of them out."""
SMALLEST_SIDE = 64
"""Fewest pixels of a preview's side."""
SEEDS = 2**32
"""Seeds are below this, as web UIs take them."""


def find_sampler(name: str, catalog: Catalog) -> type[SamplerConfig]:
    """The sampler of a name, with or without sd-scripts' `k_`. Raises PluginError where there is none to use."""
    return catalog.find(SamplerConfig, name.removeprefix("k_"))


def round_side(side: int, multiple: int = 8) -> int:
    """A side in pixels, rounded down to a multiple, but at least 64."""
    return max(SMALLEST_SIDE, side // multiple * multiple)


@frozen(kw_only=True)
class PromptSettings:
    """How an image is sampled."""

    negative_prompt: str = ""
    """Negative prompt."""
    width: int | None = field(default=None, converter=optional(round_side), validator=v.optional(v.le(LARGEST_SIDE)))
    """Width in pixels, rounded down to a multiple of 8 or what the model needs, at least 64; if absent, the model's
    default, 512 for Stable Diffusion 1.x."""
    height: int | None = field(default=None, converter=optional(round_side), validator=v.optional(v.le(LARGEST_SIDE)))
    """Height in pixels, likewise."""
    steps: int | None = field(default=None, validator=v.optional([v.ge(1), v.le(MOST_STEPS)]))
    """Number of sampling steps; if absent, the model's default, 30 for Stable Diffusion 1.x."""
    scale: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Classifier-free guidance scale (Ho & Salimans, 2022, arXiv:2207.12598); at most 1 disables guidance and the
    negative prompt. If absent, the model's default, 7.5 for Stable Diffusion 1.x."""
    guidance: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Guidance scale for models that take one as an input (embedded guidance), such as FLUX.1 dev; if absent, the
    model's default, 3.5 for FLUX.1 dev. Training uses 1. Independent of `scale`."""
    seed: int | None = field(default=None, validator=v.optional(v.ge(0)))
    """Seed of the noise; if absent, derived from `training.seed` for each prompt, the same for every preview."""
    sampler: str | None = None
    """Sampler; `lorakit plugins sampler` lists them. If absent, the model's default: `ddim` for Stable Diffusion 1.x,
    `flow_euler` for flow matching."""


@frozen(kw_only=True)
class Prompt(PromptSettings):
    """An image to sample."""

    prompt: str = field(validator=v.min_len(1))
    """What is to be seen."""


@frozen(kw_only=True)
class PreviewJob:
    """An image to sample, with all settings resolved."""

    prompt: Prompt
    """The prompt."""
    seed: int
    """Seed of the noise: the prompt's, or one made for it."""
    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""
    steps: int
    """Number of sampling steps."""
    scale: float
    """Classifier-free guidance scale."""
    guidance: float | None
    """Guidance scale that the denoiser gets; None for models that take none."""
    sampler: SamplerConfig
    """The sampler."""


def preview_jobs(prompts: Iterable[Prompt], seed: int, model: ModelFamilyConfig) -> list[PreviewJob]:
    """The images of prompts, with the model's defaults; missing seeds are derived from the run's seed and the index.

    Raises PluginError if there is no such sampler.
    """
    jobs, catalog, multiple = [], Catalog.discover(), model.size_multiple
    for index, prompt in enumerate(prompts):
        made = derived_seed(seed, "preview", index) % SEEDS
        job = PreviewJob(
            prompt=prompt,
            seed=made if prompt.seed is None else prompt.seed,
            width=round_side(prompt.width or model.preview_size, multiple),
            height=round_side(prompt.height or model.preview_size, multiple),
            steps=prompt.steps or model.preview_steps,
            scale=model.preview_scale if prompt.scale is None else prompt.scale,
            guidance=_guidance(prompt, model),
            sampler=find_sampler(prompt.sampler or model.preview_sampler or model.noise_process.sampler, catalog)(),
        )
        jobs.append(job)
    return jobs


def _guidance(prompt: Prompt, model: ModelFamilyConfig) -> float | None:
    if model.preview_guidance is None:
        return None
    return model.preview_guidance if prompt.guidance is None else prompt.guidance
