"""Stable Diffusion 1.x and 2.x as the trainer sees them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import ClassVar

import torch
from attrs import frozen
from torch import Tensor, nn

from lorakit.diffusion.noise_schedule import DDPMSchedule, Prediction
from lorakit.errors import ModelError
from lorakit.models.base import NOTHING_MERGED, BaseModel, PartModule
from lorakit.models.families.sd.checkpoint import TOKENIZER_FILES, SDCheckpoint
from lorakit.models.families.sd.infer_config import DOWNSCALING, LATENT_CHANNELS
from lorakit.models.families.sd.state_dict_keys import TEXT_ENCODER, UNET
from lorakit.models.families.sd.targets import (
    BLOCK_PATH,
    layers_behind,
    text_encoder_key,
    text_encoder_targets,
    unet_key,
    unet_targets,
)
from lorakit.models.families.sd.text_encoder import ClipTextEncoder, checkpoint_layers, clip_module, set_positions
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.families.sd.unet import BasicTransformerBlock, ResnetBlock2D, UNet, use_backend
from lorakit.models.families.sd.unet_config import UNetConfig
from lorakit.models.interfaces import AdaptationTarget, AttentionBackend, Conditioning, Memo, TextEncoder
from lorakit.models.weights.checkpoint import CheckpointPart
from lorakit.models.weights.hashing import hashes_in_folders
from lorakit.models.weights.merge_lora import Merging

_PADS_WITH_A_WORD = "padding is a word in captions"
"""In the cache, distinguishes captions from those that were encoded with each `!` as padding."""


@frozen(kw_only=True)
class Variant:
    """What a version of Stable Diffusion is called in LoRA files, and how a user wants it run."""

    version: str
    """`ss_base_model_version`: `sd_v1`."""
    architecture: str
    """`modelspec.architecture`: `stable-diffusion-v1/lora`."""
    implementation: str = "diffusers"
    """`modelspec.implementation`: the code that has the parameters' names."""
    prediction: Prediction = "epsilon"
    """What the U-Net predicts."""
    clip_skip: int | None = 1
    """Which of the text encoder's layers is read, counted from the last, which is 1; None if users cannot choose."""
    max_token_length: int = 75
    """Longest caption in tokens, a multiple of 75."""
    pad_token: int | None = None
    """Token id that fills short captions up; the end token when absent."""
    fix_text: bool = False
    """Whether captions are cleaned by ftfy."""
    no_half_vae: bool = False
    """Whether the VAE computes in float32 where the rest does not."""


def unet_module(part: CheckpointPart) -> UNet:
    """A U-Net with the part's settings, its weights still to be read."""
    return UNet(UNetConfig.of(part.settings))


class StableDiffusion(BaseModel):
    """A U-Net, the two halves of a VAE and a CLIP text encoder, each read when it is first asked for."""

    modules: ClassVar[tuple[PartModule, ...]] = (
        PartModule(
            part=TEXT_ENCODER,
            build=clip_module,
            targets=text_encoder_targets,
            key=text_encoder_key,
            finish=set_positions,
            checkpoint=checkpoint_layers,
            block_path=BLOCK_PATH,
        ),
        PartModule(
            part=UNET,
            build=unet_module,
            targets=unet_targets,
            key=unet_key,
            compiled=(ResnetBlock2D, BasicTransformerBlock),
            block_path=BLOCK_PATH,
        ),
    )
    checkpoint: SDCheckpoint

    def __init__(
        self,
        checkpoint: SDCheckpoint,
        variant: Variant,
        device: torch.device,
        dtype: torch.dtype,
        merging: Merging = NOTHING_MERGED,
    ) -> None:
        """A model of which nothing is read yet; `merging` has LoRA files that become part of its weights.

        An `AdapterError` if those do not fit it.
        """
        self.variant = variant
        super().__init__(checkpoint, DDPMSchedule(variant.prediction), device, dtype, merging)

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype that the VAE computes in."""
        return torch.float32 if self.variant.no_half_vae else self.dtype

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output, [B, 4, h, w], for noisy latents of that shape, timesteps [B] and `hidden_states`."""
        context = conditioning["hidden_states"].to(self.dtype)
        prediction: Tensor = self.denoiser(noisy_latents.to(self.dtype), timesteps, context)
        return prediction

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latents of an image of that size in pixels."""
        return LATENT_CHANNELS, height // DOWNSCALING, width // DOWNSCALING

    def set_attention(self, denoiser: nn.Module, backend: AttentionBackend) -> None:
        """Let the U-Net compute attention with this backend."""
        use_backend(denoiser, backend)

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> TextEncoder:
        """CLIP with its tokenizer; a `ModelError` if they do not fit, or there are fewer layers than are skipped."""
        part, variant = self.checkpoint.part(TEXT_ENCODER.name), self.variant
        tokenizer = self.read_tokenizer(TEXT_ENCODER.name, "tokenizer", variant.pad_token)
        layers, clip_skip = part.settings["num_hidden_layers"], variant.clip_skip or 1
        if clip_skip > layers:
            raise ModelError(f"{part} has {layers} layers; clip_skip must be at most that, not {clip_skip}")
        return ClipTextEncoder(modules[TEXT_ENCODER.name], tokenizer, clip_skip)

    def text_options(self, memo: Memo) -> list[object]:
        """What captions are encoded with, and a hash of the model's own tokenizer; empty where it uses CLIP's."""
        variant, hashes = self.variant, self.tokenizer_hashes(memo, "tokenizer")
        options: list[object] = [variant.clip_skip, variant.max_token_length, variant.pad_token, hashes]
        return options + ([_PADS_WITH_A_WORD] if variant.pad_token is not None else []) + self.cleaning

    @property
    def cleaning(self) -> list[object]:
        """What cleans captions, in `text_options`; empty if nothing does."""
        return [f"ftfy {version('ftfy')}"] if self.variant.fix_text else []

    def reads(self, target: AdaptationTarget) -> bool:
        """False for layers of the text encoder behind the one that `clip_skip` chooses."""
        return target.part != TEXT_ENCODER.name or layers_behind(target) >= (self.variant.clip_skip or 1) - 1

    def read_tokenizer(self, encoder: str, folder: str, pad: int | None) -> CaptionTokenizer:
        """The tokenizer of a text encoder, in the folder of that name or CLIP's; a `ModelError` if they do not fit."""
        part = self.checkpoint.part(encoder)
        files, variant = self.checkpoint.tokenizer_folder(folder), self.variant
        tokenizer = CaptionTokenizer(files, variant.max_token_length, pad, fix_text=variant.fix_text)
        vocabulary = part.shape_of("embeddings.token_embedding.weight")[0]
        if tokenizer.vocabulary_size > vocabulary:
            raise ModelError(f"{part} knows {vocabulary} tokens, but its tokenizer has {tokenizer.vocabulary_size}")
        return tokenizer

    def tokenizer_hashes(self, memo: Memo, *names: str) -> str:
        """Hashes of the files in the tokenizers' folders of these names; empty if the model brings none."""
        folders = [folder for name in names if (folder := self.checkpoint.tokenizer_folder(name))]
        return hashes_in_folders(folders, TOKENIZER_FILES, memo)

    def metadata_entries(self) -> Mapping[str, str]:
        """The version and how captions are read, in the keys of sd-scripts and of the metadata standard."""
        variant = self.variant
        entries = {
            "ss_base_model_version": variant.version,
            "ss_v2": str(variant.version.startswith("sd_v2")),
            "ss_clip_skip": str(variant.clip_skip),
            "ss_max_token_length": str(variant.max_token_length),
            "modelspec.architecture": variant.architecture,
            "modelspec.implementation": variant.implementation,
            "modelspec.prediction_type": "v" if variant.prediction == "v_prediction" else "epsilon",
        }
        skips = variant.clip_skip is not None and variant.clip_skip > 1
        entries |= {"modelspec.encoder_layer": str(variant.clip_skip)} if skips else {}
        return entries | ({"ss_fix_text": "True"} if variant.fix_text else {})
