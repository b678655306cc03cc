"""Trains the text encoder and the U-Net together to paint latents from captions."""

from __future__ import annotations

import torch
from autoencoder import as_tensor, latents_of
from pace import Average, Budget, set_rate
from pictures import training_caption, training_picture
from torch import Tensor, nn

from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.utils.rng import derived_seed, keyed_generator

TELLINGS = 4
"""In how many ways each picture's caption is told."""
_UNCONDITIONAL = 0.1
"""Share of captions replaced by the empty one, so that guidance has something to lead away from."""
_STEPS = 1000


@torch.no_grad()
def learning_material(vae: nn.Module, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Latents [count, 4, 8, 8] of pictures and the token ids [count, 4, 77] of what is told of each."""
    device, tokenize = next(vae.parameters()).device, CaptionTokenizer()
    latents, tokens = [], []
    for first in range(0, count, 256):
        numbers = range(first, min(first + 256, count))
        pictures = as_tensor([training_picture(seed, index) for index in numbers])
        latents.append(latents_of(vae, pictures.to(device)))
        captions = [training_caption(seed, index, telling) for index in numbers for telling in range(TELLINGS)]
        tokens.append(tokenize(captions).view(len(numbers), TELLINGS, -1))
    return torch.cat(latents), torch.cat(tokens).to(device)


def alphas(device: torch.device) -> Tensor:
    """Stable Diffusion's schedule: how much of the latents' variance is left after each of 1000 steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, _STEPS, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float().to(device)


class Denoiser(nn.Module):
    """The text encoder and the U-Net behind it, which predicts noise as Stable Diffusion 1 or velocity as 2."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module, prediction: str = "epsilon") -> None:
        super().__init__()
        self.text_encoder, self.unet, self.prediction = text_encoder, unet, prediction

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """What is predicted of latents [B, 4, 8, 8] after timesteps [B] that token ids [B, 77] describe."""
        context = self.text_encoder(tokens).last_hidden_state
        predicted: Tensor = self.unet(latents, timesteps, context).sample
        return predicted

    def target(self, latents: Tensor, noise: Tensor, amount: Tensor) -> Tensor:
        """What should be predicted where an amount [B, 1, 1, 1] of the latents' variance is left under the noise."""
        return noise if self.prediction == "epsilon" else amount.sqrt() * noise - (1 - amount).sqrt() * latents


def train_denoiser(
    model: Denoiser, material: tuple[Tensor, ...], budget: Budget, seed: int, batch: int = 64, peak: float = 1e-3
) -> None:
    """Train on latents and tokens until the square error is small; leaves the mean of the weights.

    What else `material` has of each picture is given to the model, too.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average, kept = Average(model), alphas(material[0].device)
    empty = CaptionTokenizer()([""])[0].to(material[1].device)
    losses: list[Tensor] = []
    while budget.progress() < 1:
        latents, timesteps, noise, *told = _batch(material, empty, derived_seed(seed, "denoising", budget.done), batch)
        amount = kept[timesteps].view(-1, 1, 1, 1)
        noisy = amount.sqrt() * latents + (1 - amount).sqrt() * noise
        set_rate(optimizer, peak, budget)
        # On processors bfloat16 takes longer than float32 for tensors as small as these.
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.device.type != "cpu"):
            found = model(noisy, timesteps, *told)
        loss = (found.float() - model.target(latents, noise, amount)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update()
        budget.done += 1
        losses.append(loss.detach())
        if budget.is_time_to_tell():
            print(f"U-Net: {budget}, loss {torch.stack(losses).mean().item():.4f}", flush=True)
            losses.clear()
    average.apply()


def _batch(material: tuple[Tensor, ...], empty: Tensor, seed: int, size: int) -> tuple[Tensor, ...]:
    """Latents, timesteps, noise, token ids and what else there is of one step's pictures, a function of its seed."""
    latents, told, *others = material
    device, draw = latents.device, keyed_generator(seed, "choices")
    rows = torch.from_numpy(draw.integers(len(latents), size=size))
    telling = torch.from_numpy(draw.integers(TELLINGS, size=size))
    timesteps = torch.from_numpy(draw.integers(_STEPS, size=size)).to(device)
    unconditional = torch.from_numpy(draw.random(size) < _UNCONDITIONAL).to(device)
    noise = torch.randn((size, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(device)
    tokens = torch.where(unconditional[:, None], empty, told[rows.to(device), telling.to(device)])
    return latents[rows.to(device)], timesteps, noise, tokens, *(other[rows.to(device)] for other in others)
