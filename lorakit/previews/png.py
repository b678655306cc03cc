"""Images to sample, and their PNG files, whose text says how they were sampled. Imports no torch."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.sampling import SamplerConfig
from lorakit.plugins.catalog import Catalog
from lorakit.previews.prompts import Prompt, find_sampler, round_side
from lorakit.utils.atomic_io import write_atomically
from lorakit.utils.rng import derived_seed

if TYPE_CHECKING:
    import numpy as np

SEEDS = 2**32
"""Seeds are below this, as web UIs take them."""


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
            sampler=find_sampler(prompt.sampler or model.noise_process.sampler, catalog)(),
        )
        jobs.append(job)
    return jobs


def write_png(path: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]], texts: dict[str, str]) -> None:
    """Write pixels [H, W, 3] and texts to a PNG file, atomically. Raises OutputError."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", pnginfo=info)
    write_atomically(path, content.getvalue())


def description(job: PreviewJob, step: int) -> dict[str, str]:
    """How an image was sampled after training step `step`, by name.

    `parameters` has all of it in the format of AUTOMATIC1111's web UI.
    """
    prompt, sampler = job.prompt, job.sampler
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    lines.append(
        f"Steps: {prompt.steps}, Sampler: {sampler.title or sampler.name}, CFG scale: {prompt.scale:g}, "
        f"Seed: {job.seed}, Size: {job.width}x{job.height}, Training step: {step}"
    )
    settings = {
        "prompt": prompt.prompt,
        "negative_prompt": prompt.negative_prompt,
        "width": job.width,
        "height": job.height,
        "steps": prompt.steps,
        "scale": prompt.scale,
        "seed": job.seed,
        "sampler": prompt.sampler or sampler.name,
        "training_step": step,
    }
    return {"parameters": "\n".join(lines), **{name: str(value) for name, value in settings.items()}}
