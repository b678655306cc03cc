"""Paints held-out prompts with a model and counts what the judge finds right.

python examples/tiny-sd/score.py FOLDER --sheet pictures.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import fields, frozen
from judge import Verdict, judge
from numpy.typing import NDArray
from pictures import SIDE, sheet
from scenes import caption, held_out_scene

from lorakit.randomness import derived_seed, keyed_generator


@frozen
class Score:
    """How many pictures show what they should, by what was asked for."""

    verdicts: tuple[Verdict, ...]

    def share(self, part: str) -> float:
        """The share of pictures, 0 to 1, of which a part of the verdict is true; `right` is all of it."""
        return sum(getattr(verdict, part) for verdict in self.verdicts) / max(len(self.verdicts), 1)

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {self.share(part.name):.1%}" for part in fields(Verdict))
        return f"{self.share('right'):.1%} of {len(self.verdicts)} pictures are all right ({parts})"


def paint(
    folder: Path, prompts: Sequence[str], seed: int = 0, guidance: float = 4.0, steps: int = 30, device: str = "cpu"
) -> list[NDArray[np.uint8]]:
    """A picture, RGB [64, 64, 3], of each prompt, made with diffusers; each depends on its own number and the seed."""
    pipeline = _pipeline(folder).to(device)
    pictures: list[NDArray[np.uint8]] = []
    for first in range(0, len(prompts), 50):
        part = list(prompts[first : first + 50])
        generators = [
            torch.Generator().manual_seed(derived_seed(seed, "painting", first + index)) for index in range(len(part))
        ]
        painted = pipeline(
            part,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        pictures += list(np.rint(painted * 255).astype(np.uint8))
    return pictures


def _pipeline(folder: Path) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def score(folder: Path, count: int = 200, seed: int = 0, file: Path | None = None, device: str = "cpu") -> Score:
    """What a model makes of held-out prompts; saves the pictures as a sheet if a file is given."""
    scenes = [held_out_scene(seed, index) for index in range(count)]
    prompts = [caption(scene, keyed_generator(seed, "prompt", index)) for index, scene in enumerate(scenes)]
    pictures = paint(folder, prompts, seed, device=device)
    if file:
        sheet(pictures).save(file)
    return Score(tuple(judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)))


def main() -> None:
    """Print a model's score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model, a diffusers folder")
    parser.add_argument("--count", type=int, default=200, help="how many prompts")
    parser.add_argument("--seed", type=int, default=0, help="which prompts and which noise")
    parser.add_argument("--sheet", type=Path, help="where to save the pictures side by side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    options = parser.parse_args()
    print(score(options.folder, options.count, options.seed, options.sheet, options.device))


if __name__ == "__main__":
    main()
