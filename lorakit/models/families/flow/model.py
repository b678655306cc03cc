"""Flow-matching transformers as the trainer sees them: what their families have in common.

B images in a micro-batch, h and w latent sides.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.diffusion.flow import FlowMatching
from lorakit.models.base import BaseModel
from lorakit.models.families.flow.checkpoint import DOWNSCALING, LATENT_CHANNELS, TOKENIZER_FILES, FlowCheckpoint
from lorakit.models.families.flow.layers import use_backend
from lorakit.models.interfaces import AttentionBackend, Memo
from lorakit.models.vae import VaeDecoder, VaeEncoder, read_vae_decoder, read_vae_encoder
from lorakit.models.weights.checkpoint import CheckpointPart
from lorakit.models.weights.hashing import hash_of_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorakit.models.families.flow.config import FlowTransformerConfig


class FlowTransformer(BaseModel):
    """A transformer with FLUX.1's VAE; a family gives its parts, text encoder, `predict` and `metadata_entries`."""

    checkpoint: FlowCheckpoint

    def __init__(
        self, config: FlowTransformerConfig, noise: FlowMatching, device: torch.device, dtype: torch.dtype
    ) -> None:
        """A model of which nothing is read yet. An `AdapterError` if the LoRA files to merge do not fit it."""
        self.config = config
        super().__init__(config.stored, noise, device, dtype, config.merging())

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latents of an image of that size in pixels."""
        return LATENT_CHANNELS, height // DOWNSCALING, width // DOWNSCALING

    def set_attention(self, denoiser: nn.Module, backend: AttentionBackend) -> None:
        """Let the transformer compute attention with this backend."""
        use_backend(denoiser, backend)

    def make_vae_encoder(self, part: CheckpointPart) -> VaeEncoder:
        """The VAE's encoder with its weights."""
        return read_vae_encoder(part, self.device, self.vae_dtype)

    def make_vae_decoder(self, part: CheckpointPart) -> VaeDecoder:
        """The VAE's decoder with its weights."""
        return read_vae_decoder(part, self.device, self.vae_dtype)

    def tokenizer_hashes(self, memo: Memo, folders: Sequence[Path]) -> str:
        """Hashes of the files of tokenizers in these folders."""
        files = [file for folder in folders for name in TOKENIZER_FILES if (file := folder / name).is_file()]
        return " ".join(memo.get_or_compute(file, "sha256", partial(hash_of_file, file)) for file in files)
