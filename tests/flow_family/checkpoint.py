"""A small Lumina 2 with random weights, saved as diffusers saves it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model

from lorakit.testing.flow_models import byte_tokenizer, save_tiny_flux_vae

TEXT_WIDTH = 32
LATENT_CHANNELS = 16


def make_lumina(folder: Path, seed: int = 0) -> Path:
    """Write transformer, text encoder, tokenizer, VAE, scheduler and model_index.json."""
    torch.manual_seed(seed)
    Lumina2Transformer2DModel(
        sample_size=8, in_channels=LATENT_CHANNELS, hidden_size=48, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(64, 32, 32),
        cap_feat_dim=TEXT_WIDTH,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = byte_tokenizer(tuple(names.values()), **names)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256, sliding_window=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Gemma2Model(config).save_pretrained(folder / "text_encoder")
    save_tiny_flux_vae(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "Lumina2Pipeline"}\n')
    return folder
