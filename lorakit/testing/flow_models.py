"""Tiny flow-matching models with random weights, saved as diffusers saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

QWEN3_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens of Qwen3's tokenizer that templates need."""


def make_tiny_z_image(folder: Path, seed: int = 0) -> Path:
    """A Z-Image: two main blocks, a refiner each, a text encoder of three layers, and the VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        rope_theta=256.0, axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    # Not by diffusers, whose tokens that fill captions up are uninitialised memory.
    nn.init.normal_(transformer.x_pad_token, std=0.02)
    nn.init.normal_(transformer.cap_pad_token, std=0.02)
    transformer.save_pretrained(folder / "transformer")
    save_tiny_qwen3(folder / "text_encoder", folder / "tokenizer", hidden_size=32)
    save_tiny_flux_vae(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}\n')
    return folder


def save_tiny_qwen3(folder: Path, tokenizer_folder: Path, **settings: Any) -> None:
    """A Qwen3 of three layers, and a tokenizer with one token for each byte."""
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = byte_tokenizer(QWEN3_TOKENS)
    tokenizer.save_pretrained(tokenizer_folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, **settings,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)


def save_tiny_flux_vae(folder: Path) -> None:
    """A VAE of 16 channels, an eighth of the sides, with FLUX.1's mean and scale."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=8, latent_channels=16,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).save_pretrained(folder)  # fmt: skip


def byte_tokenizer(special: Sequence[str], **names: str) -> Any:
    """A tokenizer of transformers with one token for each byte, after the special ones; `names` give these roles."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names)  # type: ignore[no-untyped-call]
