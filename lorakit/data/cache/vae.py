"""Latents of images, for the cache and for images that are encoded again in each epoch.

Shapes: B images, C latent channels, H and W image sides in pixels, h and w latent sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lorakit.data.cache.store import NotFiniteError, check_finite
from lorakit.data.images.augmentation import Picture
from lorakit.errors import DataError, Problem
from lorakit.models.interfaces import VaeEncoder


@frozen(kw_only=True)
class OnlineEncoder:
    """Encodes images whose pixels change from epoch to epoch, each time they are used."""

    encoder: VaeEncoder
    """What encodes them."""
    device: torch.device
    """Where it is."""
    batch_size: int = 1
    """Images that are encoded at once."""
    workers: int = 1
    """Threads that prepare them."""

    def entries(self, pictures: Sequence[Picture]) -> list[dict[str, Tensor]]:
        """What the cache would hold of these pictures of one size, on the CPU.

        Raises DataError where the encoder gives NaN.
        """
        found: list[dict[str, Tensor]] = []
        for start in range(0, len(pictures), self.batch_size):
            own = pictures[start : start + self.batch_size]
            pixels = on_device([picture.pixels for picture in own], self.device)
            tensors = {name: tensor.cpu() for name, tensor in encode_pixels(pixels, self.encoder).items()}
            masks = latent_masks([picture.mask for picture in own], tensors["mean"])
            for row, (picture, mask) in enumerate(zip(own, masks, strict=True)):
                entry = {name: tensor[row] for name, tensor in tensors.items()}
                try:
                    check_finite(entry)
                except NotFiniteError as error:
                    raise not_encodable(picture.name, error, is_image=True) from error
                found.append(entry if mask is None else {**entry, "mask": mask})
        return found


def on_device(images: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Images of one size on a device, uint8 [B, H, W, 3]."""
    pixels = torch.from_numpy(np.stack(images))
    # Without waiting from pinned memory alone: other memory may be in other use before a device has read it.
    return pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels.to(device)


def encode_pixels(pixels: Tensor, encoder: VaeEncoder) -> Mapping[str, Tensor]:
    """`mean` and `std` of the latents of images, float32 [B, C, h, w] each; `pixels` is uint8 [B, H, W, 3]."""
    with torch.no_grad():
        mean, std = encoder.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    return {"mean": mean, "std": std}


def latent_masks(masks: Sequence[NDArray[np.uint8] | None], latents: Tensor) -> list[Tensor | None]:
    """The masks [H, W] averaged over what each of the latents [B, C, h, w] covers, 0 to 1, float32 [1, h, w]."""
    size = latents.shape[2], latents.shape[3]
    shares = (None if mask is None else torch.from_numpy(mask.copy())[None].float() / 255 for mask in masks)
    return [None if share is None else adaptive_avg_pool2d(share, size) for share in shares]


def not_encodable(name: str, error: NotFiniteError, *, is_image: bool) -> DataError:
    """What to tell of an image or caption of which the encoder makes NaN or infinity."""
    encoder, own = ("VAE", "set model.no_half_vae = true, or ") if is_image else ("text encoder", "set ")
    cure = "set model.vae to another" if is_image else "choose another model"
    hint = f"if the {encoder} computes in fp16, it overflows: {own}training.mixed_precision to bf16 or no; "
    hint += f"otherwise its weights are damaged: {cure}"
    return DataError(str(Problem(name, f"cannot be encoded: {error}", hint)))
