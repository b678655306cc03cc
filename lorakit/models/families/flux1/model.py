"""FLUX.1 and Chroma as the trainer sees them.

B images in a micro-batch, h and w latent sides, m tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.api.components import ModelPart
from lorakit.diffusion.flow import FlowMatching
from lorakit.errors import ModelError
from lorakit.models.base import PartModule
from lorakit.models.families.flow.model import FlowTransformer
from lorakit.models.families.flow.t5 import T5Tokenizer
from lorakit.models.families.flow.t5_encoder import t5_module
from lorakit.models.families.flux1.parts import CLIP, T5, T5_ALONE, TRANSFORMER, clip_key, t5_key, transformer_key
from lorakit.models.families.flux1.settings import FluxSettings
from lorakit.models.families.flux1.targets import clip_targets, t5_targets, transformer_targets
from lorakit.models.families.flux1.text_encoders import (
    ChromaTextEncoder,
    FluxTextEncoder,
    FluxTokenizer,
    encode_clip,
    encode_t5,
)
from lorakit.models.families.flux1.transformer import DoubleStreamBlock, FluxTransformer, SingleStreamBlock
from lorakit.models.families.sd.targets import BLOCK_PATH
from lorakit.models.families.sd.text_encoder import checkpoint_layers, clip_module, set_positions
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.interfaces import Conditioning, Memo
from lorakit.models.weights.checkpoint import CheckpointPart

if TYPE_CHECKING:
    from lorakit.models.families.flux1.config import FluxFamilyConfig

SCALE = 1000
"""What the transformer takes times and guidance scales by."""
TRAINING_GUIDANCE = 1.0
"""The guidance scale at which a guidance-distilled model predicts what training asks for, the plain velocity."""


def transformer_module(part: CheckpointPart) -> FluxTransformer:
    """A transformer with the part's settings, its weights still to be read."""
    return FluxTransformer(FluxSettings.of(part.settings))


TRANSFORMER_MODULE = PartModule(
    part=TRANSFORMER,
    build=transformer_module,
    targets=transformer_targets,
    key=transformer_key,
    compiled=(DoubleStreamBlock, SingleStreamBlock),
)
"""How the transformer is built and treated."""


def _t5(part: ModelPart) -> PartModule:
    """How T5 is built and treated."""
    return PartModule(
        part=part,
        build=t5_module,
        targets=partial(t5_targets, part),
        key=t5_key,
        checkpoint=partial(checkpoint_layers, layers="block"),
    )


class Flux(FlowTransformer):
    """The transformer, CLIP, T5 and the VAE."""

    config: FluxFamilyConfig
    noise: FlowMatching
    modules = (
        PartModule(
            part=CLIP,
            build=clip_module,
            targets=clip_targets,
            key=clip_key,
            finish=set_positions,
            checkpoint=checkpoint_layers,
            block_path=BLOCK_PATH,
        ),
        _t5(T5),
        TRANSFORMER_MODULE,
    )

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity ε − x₀, [B, 16, h, w]; `guidance`, [B], is 1 where it is not given, as in training."""
        text, pooled = (conditioning[name].to(self.dtype) for name in ("hidden_states", "text_embeds"))
        times = self.noise.model_timesteps(timesteps)
        guidance = conditioning.get("guidance", torch.full_like(times, TRAINING_GUIDANCE)).float() * SCALE
        found: Tensor = self.denoiser(noisy_latents.to(self.dtype), times, text, pooled, guidance)
        return found

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> FluxTextEncoder:
        """CLIP and T5 with their tokenizers; a `ModelError` if they do not fit."""
        return FluxTextEncoder(modules[CLIP.name], modules[T5.name], self.tokenizer)

    @torch.no_grad()
    def encode_one_by_one(self, batches: Sequence[Sequence[str]], weighted: bool) -> Sequence[Conditioning]:
        """The conditioning of batches of captions, on the CPU, with one text encoder in memory at a time."""
        tokens = [self.tokenizer(captions, weighted) for captions in batches]
        clip = self.module(CLIP.name)
        pooled = [encode_clip(clip, own, self.tokenizer.clip.end).cpu() for own in tokens]
        del clip
        self.free_part(CLIP.name)
        t5 = self.module(T5.name)
        states = [encode_t5(t5, own["t5"]).cpu() for own in tokens]
        self.free_part(T5.name)
        return [{"hidden_states": own, "text_embeds": of_clip} for own, of_clip in zip(states, pooled, strict=True)]

    @cached_property
    def tokenizer(self) -> FluxTokenizer:
        """The tokenizers; a `ModelError` if they do not fit the text encoders."""
        clip = CaptionTokenizer(self.checkpoint.tokenizer_folder("tokenizer"))
        known = self.checkpoint.part(CLIP.name).shape_of("embeddings.token_embedding.weight")[0]
        _check_vocabulary(self.checkpoint.part(CLIP.name), known, clip.vocabulary_size)
        return FluxTokenizer(clip, read_t5_tokenizer(self, T5, "tokenizer_2"))

    def text_options(self, memo: Memo) -> list[object]:
        """How long captions may be, and hashes of the tokenizers."""
        folders = [self.checkpoint.tokenizer_folder(name) for name in ("tokenizer", "tokenizer_2")]
        return [self.config.caption_length, self.tokenizer_hashes(memo, [own for own in folders if own])]

    def metadata_entries(self) -> Mapping[str, str]:
        """What the model is called by other tools, and how it is trained."""
        name = "dev" if self.config.has_guidance else "schnell"
        return {
            "ss_base_model_version": "flux1",
            "ss_model_type": "flux",
            "ss_guidance_scale": str(TRAINING_GUIDANCE),
            "ss_model_prediction_type": "raw",
            "ss_apply_t5_attn_mask": "False",
            "modelspec.architecture": f"flux-1-{name}/lora",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        }


class Chroma(FlowTransformer):
    """The transformer, T5 and the VAE."""

    config: FluxFamilyConfig
    noise: FlowMatching
    modules = (_t5(T5_ALONE), TRANSFORMER_MODULE)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity ε − x₀, [B, 16, h, w]."""
        found: Tensor = self.denoiser(
            noisy_latents.to(self.dtype),
            self.noise.model_timesteps(timesteps),
            conditioning["hidden_states"].to(self.dtype),
            text_mask=conditioning.get("attention_mask"),
        )
        return found

    def split(self, conditioning: Conditioning) -> Sequence[Conditioning]:
        """Each caption with the one token of padding that the transformer sees."""
        lengths = conditioning["attention_mask"].sum(dim=1).tolist()
        return [{"hidden_states": own[:n]} for own, n in zip(conditioning["hidden_states"], lengths, strict=True)]

    def collate(self, captions: Sequence[Conditioning]) -> Conditioning:
        """Captions filled up with zeros to one length, and a mask of what is not filling, if there is any."""
        states = [caption["hidden_states"] for caption in captions]
        lengths = [len(own) for own in states]
        found = {"hidden_states": nn.utils.rnn.pad_sequence(states, batch_first=True)}
        if len(set(lengths)) > 1:  # attention without a mask is faster
            numbers = torch.arange(max(lengths), device=states[0].device)
            found["attention_mask"] = numbers < torch.tensor(lengths, device=states[0].device).unsqueeze(1)
        return found

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> ChromaTextEncoder:
        """T5 with its tokenizer; a `ModelError` if they do not fit."""
        return ChromaTextEncoder(modules[T5_ALONE.name], read_t5_tokenizer(self, T5_ALONE, "tokenizer"))

    def text_options(self, memo: Memo) -> list[object]:
        """How long captions may be, and hashes of the tokenizer."""
        folder = self.checkpoint.tokenizer_folder("tokenizer")
        return [self.config.caption_length, self.tokenizer_hashes(memo, [folder] if folder else [])]

    def metadata_entries(self) -> Mapping[str, str]:
        """What the model is called by other tools, and how it is trained."""
        return {
            "ss_base_model_version": "chroma",
            "ss_model_type": "chroma",
            "ss_guidance_scale": "0.0",
            "ss_model_prediction_type": "raw",
            "ss_apply_t5_attn_mask": "True",
            "modelspec.architecture": "chroma/lora",
            "modelspec.implementation": "https://huggingface.co/lodestones/Chroma1-HD",
        }


def read_t5_tokenizer(model: Flux | Chroma, part: ModelPart, name: str) -> T5Tokenizer:
    """T5's tokenizer, whose folder in models has that name; a `ModelError` if it does not fit the text encoder."""
    folder = model.tokenizer_folder(name)
    tokenizer, stored = T5Tokenizer(folder, model.config.caption_length), model.checkpoint.part(part.name)
    _check_vocabulary(stored, stored.shape_of("embed_tokens.weight")[0], tokenizer.vocabulary_size)
    return tokenizer


def _check_vocabulary(part: CheckpointPart, known: int, tokens: int) -> None:
    if tokens > known:
        raise ModelError(f"{part} knows {known} tokens, but its tokenizer has {tokens}")
