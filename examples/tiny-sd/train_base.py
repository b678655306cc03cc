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

VAE_STEPS, UNET_STEPS = 32_000, 7_000
SHARES = (0.75, 0.25)
"""Of the VAE's steps, for each of its courses."""


def main() -> None:
    """Train, write and score the model."""
    options = _parser().parse_args()
    device = torch.device(options.device)
    vae = (load(options.vae, "vae") if options.vae else trained_vae(options)).to(device)
    print(f"The VAE reconstructs at {quality(vae):.1f} dB.", flush=True)
    text_encoder, unet = (build(part, options.seed).to(device) for part in ("text_encoder", "unet"))
    material = learning_material(vae, options.seed, options.pictures)
    train_denoiser(
        Denoiser(text_encoder, unet), material, Budget(options.unet_steps, options.unet_minutes), options.seed
    )
    save(options.folder, {"vae": vae, "text_encoder": text_encoder, "unet": unet})
    print(f"Wrote {options.folder}.")
    if options.score:
        pipeline = load_pipeline(options.folder, device=options.device)
        print(score(pipeline, SUBJECTS["world"], options.score))


def trained_vae(options: argparse.Namespace) -> nn.Module:
    """A VAE that took all courses, rounded as in its file: what the U-Net learns from is what it will be used with."""
    vae = build("vae", options.seed)
    for number, (course, share) in enumerate(zip(COURSES, SHARES, strict=True)):
        minutes = options.vae_minutes and options.vae_minutes * share
        budget = Budget(max(round(options.vae_steps * share), 1), minutes)
        train_vae(vae.to(options.device), budget, options.seed + number, course)
        save(options.folder, {"vae": vae})
        vae = load(options.folder, "vae")
    return vae


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
