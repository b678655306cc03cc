"""Trains the small Stable Diffusion on until it predicts velocity, as Stable Diffusion 2 does, instead of noise.

    python examples/tiny-sd/velocity.py /tmp/tiny-sd-v
    lorakit train examples/quickstart/config.toml --set model.path=/tmp/tiny-sd-v --set output.dir=/tmp/zorp-v
    python examples/tiny-sd/examine.py /tmp/zorp-v/zorp.safetensors --folder /tmp/tiny-sd-v

The VAE stays as it is. Velocity: Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models,
appendix D, https://arxiv.org/abs/2202.00512.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from denoiser import Denoiser, learning_material, train_denoiser
from pace import Budget
from parts import load, save
from score import MODEL, SUBJECTS, load_pipeline, score

STEPS = 4_000
_SEED = 2
"""Other pictures than those of the two courses before."""


def main() -> None:
    """Train, write and score the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--start", type=Path, default=MODEL, help="the model to start from, a diffusers folder")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many steps (%(default)s)")
    parser.add_argument("--pictures", type=int, default=20_000, help="how many pictures to learn from")
    parser.add_argument("--score", type=int, default=200, help="how many held-out prompts to judge at the end")
    options = parser.parse_args()
    turn(options.start, options.folder, options.steps, options.pictures)
    if options.score:
        print(score(load_pipeline(options.folder), SUBJECTS["world"], options.score))


def turn(start: Path, folder: Path, steps: int, pictures: int) -> None:
    """Train the model of a folder on for some steps, from so many pictures, and write it into another folder."""
    vae, text_encoder, unet = (load(start, part) for part in ("vae", "text_encoder", "unet"))
    model = Denoiser(text_encoder, unet, prediction="v_prediction")
    train_denoiser(model, learning_material(vae, _SEED, pictures), Budget(steps), _SEED)
    save(folder, {"vae": vae, "text_encoder": text_encoder, "unet": unet}, model.prediction)


if __name__ == "__main__":
    main()
