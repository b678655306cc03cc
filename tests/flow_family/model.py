"""Lumina 2: a transformer that predicts velocities, a language model as text encoder, captions of any length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import frozen
from diffusers import Lumina2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

from lorakit.api import (
    DIFFUSERS_FILES,
    TRANSFORMERS_FILES,
    AdaptationTarget,
    AttentionBackend,
    BaseModel,
    CheckpointPart,
    Conditioning,
    FlowMatching,
    ModelCheckpoint,
    PartFormat,
    PartModule,
    TensorSlice,
)
from tests.flow_family.plugin import GEMMA, LAYOUT, TRANSFORMER

if TYPE_CHECKING:
    from lorakit.api import Tokens

MAX_TOKENS = 64
FUSED_ROWS = {"to_q": (0, 48), "to_k": (48, 72), "to_v": (72, 96)}
"""The rows of queries, keys and values in the one layer that the original code has for them."""


def transformer(part: CheckpointPart) -> nn.Module:
    """The transformer with a part's settings."""
    module: nn.Module = Lumina2Transformer2DModel.from_config(dict(part.settings))
    return module


def gemma(part: CheckpointPart) -> nn.Module:
    """The text encoder with a part's settings."""
    return Gemma2Model(Gemma2Config(**part.settings))


def set_positions(module: nn.Module, _: CheckpointPart, __: torch.device) -> None:
    """Compute the rotary embeddings, which no file has."""
    config = module.config
    module.rope_embedder = Lumina2RotaryPosEmbed(10000, config.axes_dim_rope, config.axes_lens, config.patch_size)


def set_buffers(module: nn.Module, _: CheckpointPart, device: torch.device) -> None:
    """Compute the scale of embeddings and the rotary embeddings, which no file has."""
    module.embed_tokens.embed_scale = torch.tensor(module.config.hidden_size**0.5, device=device)
    module.rotary_emb = Gemma2RotaryEmbedding(module.config).to(device)


def transformer_targets(root: nn.Module) -> Iterator[AdaptationTarget]:
    """The linear layers of the main blocks."""
    for path, module in root.named_modules():
        if path.startswith("layers.") and isinstance(module, nn.Linear):
            tags = {"transformer", "attention" if ".attn." in path else "mlp"}
            start, end = FUSED_ROWS.get(path.rpartition(".")[2], (0, 0))
            fused = TensorSlice(transformer_key(f"layers.{path.split('.')[1]}.attention.qkv"), start, end)
            yield AdaptationTarget(
                key=transformer_key(path), part=TRANSFORMER.name, root=root, path=path, tags=frozenset(tags),
                block_index=int(path.split(".")[1]), layout=LAYOUT, diffusers_path=f"transformer.{path}",
                original_path=original_path(path), fused_in=fused if end else None,
            )  # fmt: skip


def gemma_targets(root: nn.Module) -> Iterator[AdaptationTarget]:
    """The projections of the attention."""
    for path, module in root.named_modules():
        if ".self_attn." in path and isinstance(module, nn.Linear):
            yield AdaptationTarget(
                key=gemma_key(path), part=GEMMA.name, root=root, path=path, tags=frozenset({"text_encoder"}),
                encoder_index=0, diffusers_path=f"text_encoder.{path}",
            )  # fmt: skip


def transformer_key(path: str) -> str:
    """`lora_unet_layers_0_attn_to_q`."""
    return TRANSFORMER.lora_prefix + path.replace(".", "_")


def original_path(path: str) -> str:
    """`diffusion_model.layers.0.attention.to_q`, as tools have the layer that the original code has fused."""
    renamed = {".attn.": ".attention.", ".to_out.0": ".out", ".linear_": ".w", "norm1.linear": "adaLN"}
    for name, original in renamed.items():
        path = path.replace(name, original)
    return f"diffusion_model.{path}"


def gemma_key(path: str) -> str:
    """`lora_te_layers_0_self_attn_q_proj`."""
    return GEMMA.lora_prefix + path.replace(".", "_")


def recompute(module: nn.Module, share: float) -> None:
    """Let the whole module recompute its blocks."""
    if share == 1:
        module.enable_gradient_checkpointing()


def recompute_text(module: nn.Module, share: float) -> None:
    """Let the text encoder recompute its layers, which are in training mode for that; it has no dropout."""
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in module.layers:
        layer.training = True


def part_format(name: str, title: str, files: tuple[str, ...]) -> PartFormat:
    """A part in a diffusers folder, the only layout of this family."""
    return PartFormat(
        name=name, title=title, family="Lumina 2", files=files, prefix=f"{name}.", roots=("",),
        infer=lambda _: {}, shapes=lambda _: {},
    )  # fmt: skip


@frozen
class LuminaCheckpoint(ModelCheckpoint):
    """A diffusers folder."""

    formats: ClassVar = {
        "transformer": part_format("transformer", "transformer", DIFFUSERS_FILES),
        "text_encoder": part_format("text_encoder", "Gemma", TRANSFORMERS_FILES),
        "vae": part_format("vae", "VAE", DIFFUSERS_FILES),
    }


class GemmaEncoder:
    """Captions to hidden states, with a mask of what is padding."""

    def __init__(self, module: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
        self.module = module
        self.tokenizer = tokenizer

    def tokenize(self, captions: Sequence[str], weighted: bool = False) -> Tokens:  # noqa: ARG002
        """`ids` and `mask`, int64 [B, n]."""
        texts = [self.tokenizer.bos_token + caption for caption in captions]
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return {"ids": found["input_ids"], "mask": found["attention_mask"]}

    def encode(self, tokens: Tokens) -> Conditioning:
        """`hidden_states` [B, n, D] of the last layer but one, and `mask` [B, n]."""
        device = next(self.module.parameters()).device
        ids, mask = tokens["ids"].to(device), tokens["mask"].to(device)
        states = self.module(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return {"hidden_states": states, "mask": mask}


class Processor:
    """The attention of diffusers' Lumina 2, its products by one of lorakit's backends."""

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, n, D] to [B, n, D]; `attention_mask` [B, n] is false for padding."""
        layers = ((attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states), (attn.to_v, encoder_hidden_states))
        width = attn.inner_dim // attn.heads
        query, key, value = (layer(states).unflatten(2, (-1, width)) for layer, states in layers)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(own, image_rotary_emb, use_real=False) for own in (query, key))
        # Several heads of queries share one of keys and values.
        key, value = (own.repeat_interleave(attn.heads // own.shape[2], dim=2) for own in (key, value))
        heads = (own.to(value.dtype).transpose(1, 2) for own in (query, key, value))
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        out: Tensor = attn.to_out[0](self.backend(*heads, mask).transpose(1, 2).flatten(2))
        return out


class Lumina(BaseModel):
    """The transformer, the text encoder and a VAE of 16 channels."""

    modules = (
        PartModule(
            part=GEMMA, build=gemma, targets=gemma_targets, key=gemma_key, finish=set_buffers, checkpoint=recompute_text
        ),
        PartModule(
            part=TRANSFORMER,
            build=transformer,
            targets=transformer_targets,
            key=transformer_key,
            finish=set_positions,
            checkpoint=recompute,
        ),
    )
    noise: FlowMatching

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity ε − x₀; the transformer counts time from noise to image and predicts the other direction."""
        states, mask = conditioning["hidden_states"].to(self.dtype), conditioning["mask"].bool()
        time = 1 - self.noise.model_timesteps(timesteps)
        found: Tensor = self.denoiser(noisy_latents.to(self.dtype), time, states, mask, return_dict=False)[0]
        return -found

    def split(self, conditioning: Conditioning) -> Sequence[Conditioning]:
        """Each caption without its padding."""
        lengths = conditioning["mask"].sum(dim=1).tolist()
        return [{"hidden_states": states[:n]} for states, n in zip(conditioning["hidden_states"], lengths, strict=True)]

    def collate(self, captions: Sequence[Conditioning]) -> Conditioning:
        """Captions padded with zeros, and their mask."""
        states = [caption["hidden_states"] for caption in captions]
        lengths = torch.tensor([len(own) for own in states])
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
        return {"hidden_states": padded, "mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """16 channels, an eighth of the sides."""
        return 16, height // 8, width // 8

    def set_attention(self, denoiser: nn.Module, backend: AttentionBackend) -> None:
        """Through diffusers' processors."""
        for module in denoiser.modules():
            if hasattr(module, "processor"):
                module.processor = Processor(backend)

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> GemmaEncoder:
        """Gemma with its tokenizer."""
        folder = Path(str(self.checkpoint.location)) / "tokenizer"
        return GemmaEncoder(modules[GEMMA.name], PreTrainedTokenizerFast.from_pretrained(folder))

    def metadata_entries(self) -> Mapping[str, str]:
        """What files say of the model."""
        return {"ss_base_model_version": "lumina2", "modelspec.architecture": "lumina2/lora"}
