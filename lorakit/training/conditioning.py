"""What the denoiser is told about the images of a batch."""

from __future__ import annotations

import torch

from lorakit.data.loader import Batch
from lorakit.models.interfaces import Conditioning, DiffusionModel
from lorakit.networks.network import Network


def conditioning_of(batch: Batch, model: DiffusionModel, network: Network, trains_text_encoders: bool) -> Conditioning:
    """The batch's conditioning: as it was encoded, or from the text encoder as it is now; the network is told of it."""
    network.begin_batch(batch.sample_seeds)
    if batch.tokens is None:
        return batch.conditioning or {}
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains_text_encoders):
        return model.text_encoder.encode(batch.tokens)
