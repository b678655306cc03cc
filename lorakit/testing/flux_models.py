"""Tiny FLUX.1 and Chroma models with random weights, saved as diffusers saves them, and in files for each part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lorakit.testing.flow_models import save_tiny_flux_vae
from lorakit.testing.models import TINY_SD1, make_folder

TINY_FLUX: Mapping[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
"""Arguments of the transformers of both."""


def make_tiny_flux(folder: Path, kind: Literal["dev", "schnell"] = "dev", seed: int = 0) -> Path:
    """A FLUX.1: two blocks of each kind, CLIP of three layers and T5 of two, and the VAE."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    make_folder(folder, {"text_encoder": TINY_SD1["text_encoder"]}, seed)
    torch.manual_seed(seed)
    pooled = TINY_SD1["text_encoder"]["hidden_size"]
    FluxTransformer2DModel(
        **TINY_FLUX, pooled_projection_dim=pooled, guidance_embeds=kind == "dev"
    ).save_pretrained(folder / "transformer")  # fmt: skip
    save_tiny_t5(folder / "text_encoder_2", folder / "tokenizer_2")
    save_tiny_flux_vae(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=kind == "dev").save_pretrained(folder / "scheduler")
    _write_index(folder, "FluxPipeline", {
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    })  # fmt: skip
    return folder


def make_tiny_chroma(folder: Path, seed: int = 0) -> Path:
    """A Chroma: two blocks of each kind, T5 of two layers, and the VAE."""
    import torch
    from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    ChromaTransformer2DModel(
        **TINY_FLUX, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=2
    ).save_pretrained(folder / "transformer")
    save_tiny_t5(folder / "text_encoder", folder / "tokenizer")
    save_tiny_flux_vae(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    _write_index(folder, "ChromaPipeline", {
        "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "ChromaTransformer2DModel"],
    })  # fmt: skip
    return folder


def save_tiny_t5(folder: Path, tokenizer_folder: Path) -> None:
    """A T5 of two layers, and a tokenizer with one token for each printable character."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    special = ["<pad>", "</s>", "<unk>"]
    pieces = [*((name, 0.0) for name in special), ("▁", -2.0), *((chr(own), -3.0) for own in range(33, 127))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, **names).save_pretrained(tokenizer_folder)
    config = T5Config(
        vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)


def write_parts(folder: Path, target: Path) -> dict[str, str]:
    """The parts of a folder as files of their own, in the layouts that ComfyUI has; their paths by keys of `[model]`.

    A tokenizer of T5 is a folder of its own.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from lorakit.models.families.flux1.checkpoint import ChromaCheckpoint, FluxCheckpoint
    from lorakit.models.families.flux1.model import transformer_module
    from lorakit.models.families.sd.state_dict_keys import original_vae_name
    from lorakit.models.weights.modules import read_module

    target.mkdir(parents=True, exist_ok=True)
    is_chroma = not (folder / "text_encoder_2").is_dir()
    checkpoint = (ChromaCheckpoint if is_chroma else FluxCheckpoint)(folder)
    transformer = read_module(checkpoint.part("transformer"), transformer_module, torch.device("cpu"), torch.float32)
    paths = {"path": target / "transformer.safetensors", "vae": target / "ae.safetensors"}
    save_file(transformer.state_dict(), paths["path"])
    settings = json.loads((folder / "vae" / "config.json").read_text())
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    named = {original_vae_name(name, settings): (name, own) for name, own in stored.items()}
    is_convolution = {name: ".attentions." in there and own.dim() == 2 for name, (there, own) in named.items()}
    save_file(
        {name: own[:, :, None, None].clone() if is_convolution[name] else own for name, (_, own) in named.items()},
        paths["vae"],
    )
    for own in folder.glob("text_encoder*"):
        paths[own.name] = target / f"{own.name}.safetensors"
        paths[own.name].write_bytes((own / "model.safetensors").read_bytes())
    tokenizer = "tokenizer" if is_chroma else "tokenizer_2"
    paths[tokenizer] = folder / tokenizer
    return {name: str(path) for name, path in paths.items()}


def _write_index(folder: Path, pipeline: str, parts: Mapping[str, list[str]]) -> None:
    index = {
        "_class_name": pipeline, **parts, "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
