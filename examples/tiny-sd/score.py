"""Paints prompts with a model, by way of diffusers, and counts what the judge finds right.

    python examples/tiny-sd/score.py --sheet pictures.png
    python examples/tiny-sd/score.py --subject zorp --lora examples/quickstart/out/zorp.safetensors

The prompts are of scenes that the model has not seen in training, or of creatures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import fields, frozen
from creatures import CREATURES
from judge import Verdict, judge
from numpy.typing import NDArray
from pictures import SIDE, sheet
from scenes import Scene, caption, held_out_scene

from lorakit.utils.rng import derived_seed, keyed_generator

MODEL = Path(__file__).parent / "model"
STEPS, GUIDANCE = 30, 2.5
"""How pictures are painted: steps, of DDIM where the model learned DDPM, and the scale of guidance."""
_AT_ONCE = 50


@frozen
class Subject:
    """What pictures are asked for, and how they are judged."""

    scene: Callable[[int, int], Scene]
    """The scene of a seed and a number."""
    caption: Callable[[Scene, np.random.Generator], str]
    """A prompt for a scene."""
    judge: Callable[[NDArray[np.uint8], Scene], Verdict]
    """What is right about a picture of a scene."""

    def prompts(self, count: int, seed: int) -> tuple[list[Scene], list[str]]:
        """Scenes, and a prompt for each; each depends on the seed and its number alone."""
        scenes = [self.scene(seed, index) for index in range(count)]
        prompts = [self.caption(scene, keyed_generator(seed, "prompt", index)) for index, scene in enumerate(scenes)]
        return scenes, prompts

    def judged(self, pictures: Sequence[NDArray[np.uint8]], scenes: Sequence[Scene]) -> Score:
        """What is right about pictures that should show these scenes."""
        return Score(tuple(self.judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)))


SUBJECTS = {
    "world": Subject(held_out_scene, caption, judge),
    **{name: Subject(own.test_scene, own.caption, own.judge) for name, own in CREATURES.items()},
}


@frozen
class Score:
    """How many pictures show what they should, by what was asked for."""

    verdicts: tuple[Verdict, ...]

    def share(self, *parts: str) -> float:
        """The share of pictures, 0 to 1, of which all these parts of the verdict are true; `right` is every part."""
        true = sum(all(getattr(verdict, part) for part in parts) for verdict in self.verdicts)
        return true / max(len(self.verdicts), 1)

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {self.share(part.name):.1%}" for part in fields(Verdict))
        return f"{self.share('right'):.1%} of {len(self.verdicts)} pictures are all right ({parts})"


def load_pipeline(folder: Path, lora: Path | None = None, device: str = "cpu") -> Any:
    """The model in diffusers' pipeline, in float32, with a LoRA loaded by diffusers if one is given.

    A model that learned DDPM is sampled with DDIM, and any other with the scheduler that it comes with.
    """
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if not is_flow(pipeline):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="lora")
    return pipeline.to(device)


def is_flow(pipeline: Any) -> bool:
    """Whether a pipeline is of a model that learned flow matching."""
    return type(pipeline.scheduler).__name__.startswith("FlowMatch")


def paint(
    pipeline: Any,
    prompts: Sequence[str],
    seed: int = 0,
    steps: int = STEPS,
    **options: Any,
) -> list[NDArray[np.uint8]]:
    """A picture, RGB [64, 64, 3], of each prompt; each depends on its own number and the seed.

    `options` go to the pipeline.
    """
    # diffusers' Z-Image counts the scale from 0, which is 1 elsewhere: no guidance.
    options.setdefault("guidance_scale", GUIDANCE - 1 if is_flow(pipeline) else GUIDANCE)
    pictures: list[NDArray[np.uint8]] = []
    for first in range(0, len(prompts), _AT_ONCE):
        part = list(prompts[first : first + _AT_ONCE])
        seeds = [derived_seed(seed, "painting", first + index) for index in range(len(part))]
        painted = pipeline(
            part,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(own) for own in seeds],
            output_type="np",
            **options,
        ).images
        pictures += list(np.rint(painted * 255).astype(np.uint8))
    return pictures


def score(
    pipeline: Any, subject: Subject, count: int = 200, seed: int = 0, file: Path | None = None, steps: int = STEPS
) -> Score:
    """What a pipeline makes of prompts about a subject; saves the pictures as a sheet if a file is given."""
    scenes, prompts = subject.prompts(count, seed)
    pictures = paint(pipeline, prompts, seed, steps)
    if file:
        sheet(pictures, columns=20).save(file)
    return subject.judged(pictures, scenes)


def main() -> None:
    """Print a model's score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL, help="the model, a diffusers folder")
    parser.add_argument("--subject", choices=SUBJECTS, default="world", help="what to ask for")
    parser.add_argument("--lora", type=Path, help="a LoRA to load")
    parser.add_argument("--strength", type=float, default=1.0, help="of the LoRA")
    parser.add_argument("--count", type=int, default=200, help="how many prompts")
    parser.add_argument("--seed", type=int, default=0, help="which prompts and which noise")
    parser.add_argument("--sheet", type=Path, help="where to save the pictures side by side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    options = parser.parse_args()
    pipeline = load_pipeline(options.folder, options.lora, options.device)
    if options.lora:
        pipeline.set_adapters("lora", options.strength)
    print(score(pipeline, SUBJECTS[options.subject], options.count, options.seed, options.sheet))


if __name__ == "__main__":
    main()
