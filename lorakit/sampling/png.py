"""Pictures as PNG files that say how they were drawn. Imports no torch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.files import write_atomically
from lorakit.sampling.prompts import Picture
from lorakit.sampling.samplers import SAMPLERS

if TYPE_CHECKING:
    import numpy as np


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


def description(picture: Picture, step: int) -> dict[str, str]:
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
