"""Trains a VAE: pictures of 64 pixels to latents of 8 × 8 pixels and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pace import Average, Budget, set_rate
from pictures import draw, medley, toy, training_picture
from scenes import held_out_scene
from torch import Tensor, nn

from lorakit.utils.rng import derived_seed, keyed_generator

Course = Sequence[Callable[[int, int], NDArray[np.uint8]]]
"""What draws the pictures to learn from, given a seed and a number, by turns."""

COURSES: tuple[Course, ...] = (
    (medley, training_picture, training_picture, training_picture),
    (medley, training_picture, toy, toy),
)
"""First what is asked for most, then more of everything, so that the VAE can show what the world does not have."""


def as_tensor(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """Pictures as the VAE takes them: float32 [B, 3, 64, 64] from -1 to 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def train_vae(
    vae: nn.Module, budget: Budget, seed: int, course: Course = COURSES[0], batch: int = 8, peak: float = 1.5e-3
) -> None:
    """Train the VAE on the pictures of a course, and leave the mean of its weights in it.

    The loss is the mean over pictures of the root mean square error, so that a picture that is easy to paint counts as
    much as one that is not, and some KL divergence. Ends with latents of the mean and deviation that the VAE's settings
    say.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    average, device = Average(vae), next(vae.parameters()).device
    while budget.progress() < 1:
        pictures = as_tensor(_pictures(course, seed, budget.done * batch, batch)).to(device)
        set_rate(optimizer, peak, budget)
        loss = _loss(vae, pictures, derived_seed(seed, "VAE noise", budget.done))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        budget.done += 1
        if budget.is_time_to_tell():
            print(f"VAE: {budget}, loss {loss.item():.4f}, {quality(vae):.1f} dB", flush=True)
    average.apply()
    normalise(vae, seed, course)


def _pictures(course: Course, seed: int, first: int, count: int) -> list[NDArray[np.uint8]]:
    """The pictures of a course from a number on."""
    return [course[index % len(course)](seed, index) for index in range(first, first + count)]


def _loss(vae: nn.Module, pictures: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    with torch.autocast(pictures.device.type, torch.bfloat16):
        latents = vae.encode(pictures).latent_dist
        mean, log_variance = latents.mean.float(), latents.logvar.float()
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        painted = vae.decode(mean + noise * (log_variance / 2).exp()).sample.float()
    error = (painted - pictures).square().mean((1, 2, 3)).add(1e-6).sqrt()
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
    return error.mean() + 1e-5 * divergence


@torch.no_grad()
def quality(vae: nn.Module, count: int = 64, seed: int = 1) -> float:
    """How well the VAE paints pictures of held-out scenes: the mean over pictures of the PSNR, in dB."""
    pictures = as_tensor(
        [draw(held_out_scene(seed, index), keyed_generator(seed, "test", index)) for index in range(count)]
    ).to(next(vae.parameters()).device)
    painted = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    errors = ((painted - pictures) / 2).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


@torch.no_grad()
def latents_of(vae: nn.Module, pictures: Tensor) -> Tensor:
    """The latents' means, scaled for the denoiser, float32 [B, C, 8, 8]."""
    factor, shift = _scaling(vae)
    return (torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)]) - shift) * factor


def _scaling(vae: nn.Module) -> tuple[float, float]:
    """What latents are multiplied by to make their deviation 1, and what their mean is before."""
    return vae.config.scaling_factor, vae.config.shift_factor or 0.0


@torch.no_grad()
def normalise(vae: nn.Module, seed: int, course: Course = COURSES[0]) -> None:
    """Fold each latent channel's mean and deviation into the 1×1 convolutions on both sides of the latents.

    They then have the mean and the scale that the VAE's settings say, which single files take for granted.
    """
    device, (factor, shift) = next(vae.parameters()).device, _scaling(vae)
    latents = latents_of(vae, as_tensor(_pictures(course, seed, 0, 512)).to(device)) / factor + shift
    mean, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * factor
    into, out_of, count = vae.quant_conv, vae.post_quant_conv, len(mean)
    into.bias[:count] = (into.bias[:count] - mean) / scale + shift
    into.weight[:count] /= scale[:, None, None, None]
    into.bias[count:] -= 2 * scale.log()
    out_of.bias += (out_of.weight[:, :, 0, 0] * (mean - shift * scale)).sum(1)
    out_of.weight *= scale[None, :, None, None]
