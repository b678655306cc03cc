"""A small Lumina 2 with random weights, saved as diffusers saves it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

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
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256, sliding_window=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Gemma2Model(config).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4,
        latent_channels=LATENT_CHANNELS, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")  # fmt: skip
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "Lumina2Pipeline"}\n')
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, after padding, start and end."""
    special = ["<pad>", "<bos>", "<eos>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names)
