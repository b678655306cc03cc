"""Small models with random weights, in the real layouts, for tests and benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Settings = dict[str, dict[str, Any]]
"""Arguments of each part's module, by part: `unet`, `vae`, `text_encoder`."""


def _sd1_settings(
    image_side: int, channels: Sequence[int], vae_channels: Sequence[int], layers: int, text: dict[str, int]
) -> Settings:
    """Settings of a Stable Diffusion 1.x of any size; `text` has those of the text encoder that differ with size."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    tokens = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return {
        "unet": {
            "sample_size": image_side // 8,
            "block_out_channels": list(channels),
            "layers_per_block": layers,
            "cross_attention_dim": text["hidden_size"],
        },
        "vae": {
            "sample_size": image_side,
            "block_out_channels": list(vae_channels),
            "layers_per_block": layers,
            **blocks,
        },
        "text_encoder": {**text, **tokens, "hidden_act": "quick_gelu"},
    }


TINY_SD1 = _sd1_settings(
    image_side=64,
    channels=(32, 64, 64, 64),
    vae_channels=(32, 32, 64, 64),
    layers=1,
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
)
"""Stable Diffusion 1.x made small: 4 levels, latents an eighth of the image's size, CLIP's whole vocabulary."""

FULL_SD1 = _sd1_settings(
    image_side=512,
    channels=(320, 640, 1280, 1280),
    vae_channels=(128, 256, 512, 512),
    layers=2,
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
)
"""Stable Diffusion 1.5 in full size."""

_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
}
_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_MODULES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
}


def make_tiny_sd1(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder with a tiny Stable Diffusion 1.x of random weights, which all tools can load."""
    return make_folder(folder, TINY_SD1, seed)


def make_folder(folder: Path, settings: Settings, seed: int = 0, dtype: str = "float32") -> Path:
    """A diffusers folder with a model of these settings and random weights in the given number format."""
    import torch
    from safetensors.torch import save_file

    for part in settings:
        (folder / part).mkdir(parents=True, exist_ok=True)
        config, shapes = _config_and_shapes(part, settings[part])
        _write_json(folder / part / "config.json", config)
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in random_weights(shapes, seed)}
        save_file(weights, folder / part / _WEIGHTS[part], metadata={"format": "pt"})
    _write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    index: dict[str, Any] = {part: list(module) for part, module in _MODULES.items()}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDPMScheduler"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    _write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})
    return folder


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Random float32 weights that keep activations near unit variance, one tensor after the other.

    Matrices and kernels have variance 1 / inputs, normalisations are 1, biases 0, and the last layer of a
    U-Net is small, as it is in a trained one.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if name.endswith("bias"):
            yield name, torch.zeros(shape)
        elif len(shape) == 1:
            yield name, torch.ones(shape)
        else:
            scale = 0.02 if "embedding.weight" in name else 1 / math.sqrt(math.prod(shape[1:]))
            scale *= 0.1 if name == "conv_out.weight" else 1.0
            yield name, torch.randn(shape, generator=generator).mul_(scale)


def to_single_file(folder: Path, path: Path) -> Path:
    """A diffusers folder's model as one `.safetensors` or `.ckpt` file in the original layout."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)}
    for part, file in _WEIGHTS.items():
        settings = json.loads((folder / part / "config.json").read_text())
        for name, tensor in load_file(folder / part / file).items():
            is_convolution = part == "vae" and ".attentions." in name and tensor.dim() == 2
            tensors[_original_name(part, name, settings)] = tensor[:, :, None, None] if is_convolution else tensor
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": tensors, "global_step": 0}, path)
    return path


def _original_name(part: str, name: str, settings: Mapping[str, Any]) -> str:
    """The name in a single file of a tensor in a diffusers folder."""
    from lorakit.models.stable_diffusion import layout

    if part == "unet":
        return layout.UNET_PREFIX + layout.original_unet_name(name, settings)
    if part == "vae":
        return layout.VAE_PREFIX + layout.original_vae_name(name, settings)
    return layout.TEXT_PREFIX + name


def _config_and_shapes(part: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """What a part's config file says, and the shapes of its tensors under the names of its weights file."""
    from lorakit.models.weights import shapes_of, without_weights

    if part == "text_encoder":
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        config = CLIPTextConfig(**settings)
        shapes = shapes_of(without_weights(lambda: CLIPTextModel(config)))
        named = {f"text_model.{name}": shape for name, shape in shapes.items()}
        return {**config.to_dict(), "architectures": ["CLIPTextModel"]}, named
    if part == "unet":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as Module
    else:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Module
    module = without_weights(lambda: Module(**settings))
    public = {key: value for key, value in module.config.items() if not key.startswith("_")}
    return {"_class_name": Module.__name__, **public}, shapes_of(module)


def _write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer in the form that transformers reads."""
    from lorakit.models.stable_diffusion.tokenizer import clip_vocabulary

    folder.mkdir(exist_ok=True)
    vocabulary, merges = clip_vocabulary()
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    end = "<|endoftext|>"
    tokens = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", tokens)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(content), indent=2, default=list), encoding="utf-8")
