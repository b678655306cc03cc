"""Trains a small Stable Diffusion from scratch, on pictures drawn here, and writes it as a diffusers folder.

    python examples/tiny-sd/train_base.py

First the VAE learns, then the text encoder and the U-Net together. Given steps, the result depends on the seed and the
machine's arithmetic alone; given minutes, on its speed as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from autoencoder import COURSES, quality, train_vae
from denoiser import Denoiser, learning_material, train_denoiser
from pace import Budget
from parts import build, load, save
from score import MODEL, SUBJECTS, load_pipeline, score
from torch import nn

VAE_STEPS, UNET_STEPS = 32_000, 14_000
VAE_SHARES, UNET_SHARES = (0.75, 0.25), (0.5, 0.5)
"""Of a part's steps, for each of its courses. The U-Net's differ in their pictures only."""


def main() -> None:
    """Train, write and score the model."""
    options = _parser().parse_args()
    vae = (load(options.vae, "vae") if options.vae else trained_vae(options)).to(options.device)
    print(f"The VAE reconstructs at {quality(vae):.1f} dB.", flush=True)
    train_painting(vae, options)
    print(f"Wrote {options.folder}.")
    if options.score:
        pipeline = load_pipeline(options.folder, device=options.device)
        print(score(pipeline, SUBJECTS["world"], options.score))


def trained_vae(options: argparse.Namespace) -> nn.Module:
    """A VAE that took all courses, rounded as in its file: what the U-Net learns from is what it will be used with."""
    vae = build("vae", options.seed)
    for number, (course, share) in enumerate(zip(COURSES, VAE_SHARES, strict=True)):
        budget = _part_of(options.vae_steps, options.vae_minutes, share)
        train_vae(vae.to(options.device), budget, options.seed + number, course)
        save(options.folder, {"vae": vae})
        vae = load(options.folder, "vae")
    return vae


def train_painting(vae: nn.Module, options: argparse.Namespace) -> None:
    """Train the text encoder and the U-Net together in all courses; the folder has the model after each."""
    parts = {part: build(part, options.seed) for part in ("text_encoder", "unet")}
    for number, share in enumerate(UNET_SHARES):
        seed = options.seed + number
        model = Denoiser(**parts).to(options.device)
        material = learning_material(vae, seed, options.pictures)
        train_denoiser(model, material, _part_of(options.unet_steps, options.unet_minutes, share), seed)
        save(options.folder, {"vae": vae, **parts})
        parts = {part: load(options.folder, part) for part in parts}


def _part_of(steps: int, minutes: float | None, share: float) -> Budget:
    return Budget(max(round(steps * share), 1), minutes and minutes * share)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL, help="where to write the model")
    parser.add_argument("--seed", type=int, default=0, help="decides the first weights, the pictures and the noise")
    parser.add_argument("--vae", type=Path, help="take the VAE of this folder, and do not train one")
    parser.add_argument("--pictures", type=int, default=20_000, help="how many pictures the U-Net learns from")
    parser.add_argument("--score", type=int, default=200, help="how many held-out prompts to judge at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    for part, steps in (("vae", VAE_STEPS), ("unet", UNET_STEPS)):
        length = parser.add_mutually_exclusive_group()
        length.add_argument(f"--{part}-steps", type=int, default=steps, help=f"steps of the {part} (%(default)s)")
        length.add_argument(f"--{part}-minutes", type=float, help=f"minutes for the {part} instead")
    return parser


if __name__ == "__main__":
    main()
