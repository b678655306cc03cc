"""Anima as the trainer sees it.

B images in a micro-batch, h and w latent sides, D channels of a caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.diffusion.flow import FlowMatching
from lorakit.errors import ModelError
from lorakit.models.base import PartModule
from lorakit.models.families.anima.llm_adapter import LLMAdapter
from lorakit.models.families.anima.parts import (
    CONDITIONER,
    LAYOUT,
    TRANSFORMER,
    conditioner_key,
    diffusers_name,
    transformer_key,
)
from lorakit.models.families.anima.structure import TEXT_LENGTH, ConditionerConfig, TransformerConfig
from lorakit.models.families.anima.text_encoder import AnimaTextEncoder
from lorakit.models.families.anima.transformer import Block, Transformer
from lorakit.models.families.flow.config import MAX_TOKENS
from lorakit.models.families.flow.model import FlowTransformer
from lorakit.models.families.flow.qwen3 import (
    QWEN3,
    Qwen3Tokenizer,
    qwen3_key,
    qwen3_module,
    qwen3_targets,
    set_rotary,
)
from lorakit.models.families.flow.t5 import T5Tokenizer
from lorakit.models.interfaces import AdaptationTarget, Conditioning, Memo
from lorakit.models.qwen_image_vae import (
    QwenImageVaeDecoder,
    QwenImageVaeEncoder,
    read_qwen_image_vae_decoder,
    read_qwen_image_vae_encoder,
)
from lorakit.models.qwen_image_vae_files import ENCODER_ROOTS
from lorakit.models.weights.checkpoint import CheckpointPart

_KINDS = {"self_attn": "attention", "cross_attn": "attention", "mlp": "mlp"}
_SELF, _CROSS = {"q_proj", "k_proj", "v_proj"}, {"k_proj", "v_proj"}


def transformer_module(part: CheckpointPart) -> Transformer:
    """A transformer with the part's settings, its weights still to be read."""
    return Transformer(TransformerConfig.of(part.settings))


def conditioner_module(part: CheckpointPart) -> LLMAdapter:
    """An LLM adapter with the part's settings, its weights still to be read."""
    return LLMAdapter(ConditionerConfig.of(part.settings))


def transformer_targets(root: nn.Module) -> Iterator[AdaptationTarget]:
    """The linear layers of all blocks; those of attention and MLPs have the tag `transformer`."""
    for path, kind in _block_layers(root):
        yield AdaptationTarget(
            key=transformer_key(path),
            part=TRANSFORMER.name,
            root=root,
            path=path,
            tags=frozenset({kind} if kind == "modulation" else {kind, "transformer"}),
            block_index=int(path.split(".")[1]),
            layout=LAYOUT,
            diffusers_path=f"transformer.{diffusers_name(path)}",
            original_path=f"diffusion_model.{path}",
            shared_input=_shared_input(path),
        )


def conditioner_targets(root: nn.Module) -> Iterator[AdaptationTarget]:
    """The linear layers of all blocks of the LLM adapter."""
    for path, kind in _block_layers(root):
        yield AdaptationTarget(
            key=conditioner_key(path),
            part=CONDITIONER.name,
            root=root,
            path=path,
            tags=frozenset({"text_encoder", kind}),
            encoder_index=CONDITIONER.encoders[0],
            diffusers_path=f"{CONDITIONER.name}.{path}",
            original_path=f"diffusion_model.llm_adapter.{path}",
            shared_input=_shared_input(path),
        )


def _block_layers(root: nn.Module) -> Iterator[tuple[str, str]]:
    """The path and the kind of each linear layer in a block."""
    for path, layer in root.named_modules():
        if isinstance(layer, nn.Linear) and path.startswith("blocks."):
            yield path, _KINDS.get(path.split(".")[2], "modulation")


def _shared_input(path: str) -> str:
    """The name of what a projection of queries, keys or values reads with others; empty for other layers."""
    attention, _, layer = path.rpartition(".")
    if attention.endswith("cross_attn"):
        return "encoder_hidden_states" if layer in _CROSS else ""
    return attention if layer in _SELF else ""


class Anima(FlowTransformer):
    """The transformer, Qwen3 with the LLM adapter, and Qwen-Image's VAE."""

    vae_encoder_roots = ENCODER_ROOTS
    modules = (
        PartModule(part=QWEN3, build=qwen3_module, targets=qwen3_targets, key=qwen3_key, finish=set_rotary),
        PartModule(part=CONDITIONER, build=conditioner_module, targets=conditioner_targets, key=conditioner_key),
        PartModule(
            part=TRANSFORMER,
            build=transformer_module,
            targets=transformer_targets,
            key=transformer_key,
            compiled=(Block,),
        ),
    )
    noise: FlowMatching

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity ε − x₀, [B, 16, h, w]; the transformer is told the time from 0 to 1, in float32."""
        states, times = conditioning["hidden_states"].to(self.dtype), self.noise.model_timesteps(timesteps)
        found: Tensor = self.denoiser(noisy_latents.to(self.dtype), times, states)
        return found

    def split(self, conditioning: Conditioning) -> Sequence[Conditioning]:
        """Each caption without the zeros behind it."""
        captions = conditioning["hidden_states"]
        # One row more than those behind which there are only zeros.
        lengths = [max(rows.nonzero().flatten().tolist(), default=0) + 1 for rows in captions.any(dim=2).cpu()]
        return [{"hidden_states": states[:length]} for states, length in zip(captions, lengths, strict=True)]

    def collate(self, captions: Sequence[Conditioning]) -> Conditioning:
        """Captions with zeros behind them up to 512 rows, which the transformer attends to as to others."""
        states = nn.utils.rnn.pad_sequence([caption["hidden_states"] for caption in captions], batch_first=True)
        return {"hidden_states": F.pad(states, (0, 0, 0, max(TEXT_LENGTH - states.shape[1], 0)))}

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> AnimaTextEncoder:
        """Qwen3 and the LLM adapter with their tokenizers; a `ModelError` if one does not fit."""
        folder, t5_folder = self.tokenizer_folders
        tokenizers = Qwen3Tokenizer(folder, "{}", MAX_TOKENS), T5Tokenizer(t5_folder, MAX_TOKENS)
        known = ConditionerConfig.of(self.checkpoint.part(CONDITIONER.name).settings).target_vocab_size
        if tokenizers[1].vocabulary_size > known:
            raise ModelError(f"the tokenizer in {t5_folder} is not that of T5: the LLM adapter knows {known} tokens")
        return AnimaTextEncoder(modules[QWEN3.name], modules[CONDITIONER.name], *tokenizers)

    @property
    def tokenizer_folders(self) -> list[Path]:
        """Where the tokenizers of Qwen3 and T5 are; a `ModelError` if one is nowhere."""
        return [self.tokenizer_folder(name) for name in self.config.tokenizer_fields]

    def text_options(self, memo: Memo) -> list[object]:
        """The longest caption, and hashes of the tokenizers."""
        return [MAX_TOKENS, self.tokenizer_hashes(memo, self.tokenizer_folders)]

    def make_vae_encoder(self, part: CheckpointPart) -> QwenImageVaeEncoder:
        """The encoder half of Qwen-Image's VAE with its weights."""
        return read_qwen_image_vae_encoder(part, self.device, self.vae_dtype)

    def make_vae_decoder(self, part: CheckpointPart) -> QwenImageVaeDecoder:
        """The decoder half of Qwen-Image's VAE with its weights."""
        return read_qwen_image_vae_decoder(part, self.device, self.vae_dtype)

    def metadata_entries(self) -> Mapping[str, str]:
        """What the model is called by other tools."""
        return {
            "ss_base_model_version": "anima",
            "modelspec.architecture": "anima-preview/lora",
            "modelspec.implementation": "https://huggingface.co/circlestone-labs/Anima",
        }
