"""Pictures to draw, and the PNG files that they become, which say how they were drawn. Imports no torch."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lorakit.diffusion.samplers import SAMPLERS
from lorakit.previews.prompts import Prompt
from lorakit.utils.atomic_io import write_atomically
from lorakit.utils.rng import derived_seed

if TYPE_CHECKING:
    import numpy as np

SEEDS = 2**32
"""How many seeds there are to be made: those that web UIs take too."""


@frozen(kw_only=True)
class PreviewJob:
    """A picture to draw, with the noise that it starts from settled."""

    prompt: Prompt
    seed: int
    """Seed of the noise: the prompt's own, or one made for it."""


def with_seeds(prompts: Iterable[Prompt], seed: int) -> list[PreviewJob]:
    """The pictures of prompts; those without a seed of their own get one from the run's seed and their place."""
    pictures = []
    for index, prompt in enumerate(prompts):
        made = derived_seed(seed, "preview", index) % SEEDS
        pictures.append(PreviewJob(prompt=prompt, seed=made if prompt.seed is None else prompt.seed))
    return pictures


def write_png(path: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]], texts: dict[str, str]) -> None:
    """Write pixels [H, W, 3] with texts in them, whole or not at all. Raises OutputError."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", pnginfo=info)
    write_atomically(path, content.getvalue())


def description(picture: PreviewJob, step: int) -> dict[str, str]:
    """How a picture was drawn after so many training steps, by name.

    `parameters` holds all of it in the form that AUTOMATIC1111's web UI writes and reads.
    """
    prompt = picture.prompt
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    lines.append(
        f"Steps: {prompt.steps}, Sampler: {SAMPLERS[prompt.sampler].title}, CFG scale: {prompt.scale:g}, "
        f"Seed: {picture.seed}, Size: {prompt.width}x{prompt.height}, Training step: {step}"
    )
    settings = {
        "prompt": prompt.prompt,
        "negative_prompt": prompt.negative_prompt,
        "width": prompt.width,
        "height": prompt.height,
        "steps": prompt.steps,
        "scale": prompt.scale,
        "seed": picture.seed,
        "sampler": prompt.sampler,
        "training_step": step,
    }
    return {"parameters": "\n".join(lines), **{name: str(value) for name, value in settings.items()}}
