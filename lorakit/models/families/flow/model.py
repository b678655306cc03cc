"""Flow-matching transformers as the trainer sees them: what their families have in common.

B images in a micro-batch, h and w latent sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.diffusion.flow import FlowMatching
from lorakit.errors import ModelError
from lorakit.models.base import BaseModel
from lorakit.models.families.flow.checkpoint import DOWNSCALING, LATENT_CHANNELS, TOKENIZER_FILES, FlowCheckpoint
from lorakit.models.families.flow.layers import use_backend
from lorakit.models.interfaces import AttentionBackend, Memo
from lorakit.models.weights.hashing import hashes_in_folders

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

    def tokenizer_hashes(self, memo: Memo, folders: Sequence[Path]) -> str:
        """Hashes of the files of tokenizers in these folders."""
        return hashes_in_folders(folders, TOKENIZER_FILES, memo)

    def tokenizer_folder(self, name: str) -> Path:
        """The folder with a tokenizer, which is called `name` in models; a `ModelError` if there is none."""
        folder = self.checkpoint.tokenizer_folder(name)
        if folder is None:
            raise ModelError(f"{self.checkpoint.location} has no {name}; give {self.config.usual_parts[name]}")
        return folder
