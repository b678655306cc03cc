"""Tiny flow-matching models with random weights, saved as diffusers saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.models.families.anima.parts import original_name
from lorakit.models.qwen_image_vae_files import original_name as original_vae_name

T5_TOKENS = ("<pad>", "</s>", "<unk>")
"""Special tokens of T5's tokenizer."""
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


def make_tiny_anima(folder: Path, seed: int = 0) -> Path:
    """An Anima: two blocks, an LLM adapter of one, a text encoder of three layers, and the VAE."""
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    torch.manual_seed(seed)
    CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2.0,
        text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=True, extra_pos_embed_type=None,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    t5_tokenizer = byte_tokenizer(T5_TOKENS)
    t5_tokenizer.save_pretrained(folder / "t5_tokenizer")
    AnimaTextConditioner(
        source_dim=32, target_dim=24, model_dim=24, num_layers=1, num_attention_heads=2, mlp_ratio=2.0,
        target_vocab_size=len(t5_tokenizer),
    ).save_pretrained(folder / "text_conditioner")  # fmt: skip
    save_tiny_qwen3(folder / "text_encoder", folder / "tokenizer", hidden_size=32)
    save_tiny_qwen_image_vae(folder / "vae")
    return folder


def anima_files(model: Path, folder: Path) -> dict[str, Path]:
    """The parts of an Anima in diffusers' layout as ComfyUI has them: `path`, `text_encoder` and `vae`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: load_file(next((model / name).glob("*.safetensors")))
        for name in ("transformer", "text_conditioner", "text_encoder", "vae")
    }
    contents = {
        "path": {
            **{f"net.{original_name(name)}": tensor for name, tensor in weights["transformer"].items()},
            **{f"net.llm_adapter.{name}": tensor for name, tensor in weights["text_conditioner"].items()},
        },
        "text_encoder": {f"model.{name}": tensor for name, tensor in weights["text_encoder"].items()},
        "vae": {original_vae_name(name, 1): tensor for name, tensor in weights["vae"].items()},
    }
    files = {name: folder / f"{name}.safetensors" for name in contents}
    for name, tensors in contents.items():
        save_file(tensors, files[name])
    return files


def save_tiny_qwen_image_vae(folder: Path) -> None:
    """A VAE of 16 channels, an eighth of the sides, with Qwen-Image's means and deviations."""
    from diffusers import AutoencoderKLQwenImage

    AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1).save_pretrained(folder)


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
