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


def _settings(
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


def _as_sd2(settings: Settings) -> Settings:
    """The settings made those of a Stable Diffusion 2.x: linear layers, heads of 64 channels, OpenCLIP, other padding.

    The text encoder's layers are those that are read; single files have one more.
    """
    heads = [max(channels // 64, 1) for channels in settings["unet"]["block_out_channels"]]
    return {
        "unet": {**settings["unet"], "attention_head_dim": heads, "use_linear_projection": True},
        "vae": settings["vae"],
        "text_encoder": {**settings["text_encoder"], "hidden_act": "gelu", "pad_token_id": 0},
    }


TINY_SD1 = _settings(
    image_side=64,
    channels=(32, 64, 64, 64),
    vae_channels=(32, 32, 64, 64),
    layers=1,
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
)
"""Stable Diffusion 1.x made small: 4 levels, latents an eighth of the image's size, CLIP's whole vocabulary."""

FULL_SD1 = _settings(
    image_side=512,
    channels=(320, 640, 1280, 1280),
    vae_channels=(128, 256, 512, 512),
    layers=2,
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
)
"""Stable Diffusion 1.5 in full size."""

TINY_SD2 = _as_sd2(
    _settings(
        image_side=64,
        channels=(32, 64, 128, 128),
        vae_channels=(32, 32, 64, 64),
        layers=1,
        text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    )
)
"""Stable Diffusion 2.x made small: like `TINY_SD1`, but wide enough for several heads at the lower levels."""

FULL_SD2 = _as_sd2(
    _settings(
        image_side=512,
        channels=(320, 640, 1280, 1280),
        vae_channels=(128, 256, 512, 512),
        layers=2,
        text={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    )
)
"""Stable Diffusion 2.1 base in full size."""


def _as_sdxl(channels: Sequence[int], vae: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> Settings:
    """Settings of an SDXL of any width, with the depth of the real one, which alone has all of its layers' names."""
    width = second["hidden_size"]
    return {
        "unet": {
            "sample_size": vae["sample_size"] // 8,
            "block_out_channels": list(channels),
            "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [max(own // 64, 1) for own in channels],
            "use_linear_projection": True,
            "cross_attention_dim": first["hidden_size"] + width,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": width + 6 * 256,
        },
        "vae": {**vae, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": first,
        "text_encoder_2": {**second, "hidden_act": "gelu", "pad_token_id": 0, "projection_dim": width},
    }


TINY_SDXL = _as_sdxl(
    (32, 64, 128),
    TINY_SD1["vae"],
    {**TINY_SD1["text_encoder"], "num_hidden_layers": 12},
    {**TINY_SD1["text_encoder"], "num_hidden_layers": 32},
)
"""Stable Diffusion XL made narrow: all blocks and layers of the real one, a tenth or less of its width."""

FULL_SDXL = _as_sdxl(
    (320, 640, 1280),
    {**FULL_SD1["vae"], "sample_size": 1024},
    FULL_SD1["text_encoder"],
    {
        **FULL_SD1["text_encoder"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
    },
)
"""Stable Diffusion XL in full size."""

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
    "text_encoder_2": "model.safetensors",
}
_MODULES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


def make_tiny_sd1(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder with a tiny Stable Diffusion 1.x of random weights, which all tools can load."""
    return make_folder(folder, TINY_SD1, seed)


def make_tiny_sd2(folder: Path, seed: int = 0, prediction: str = "epsilon") -> Path:
    """A diffusers folder with a tiny Stable Diffusion 2.x, base (`epsilon`) or 768-v (`v_prediction`)."""
    return make_folder(folder, TINY_SD2, seed, prediction=prediction)


def make_tiny_sdxl(folder: Path, seed: int = 0, prediction: str = "epsilon") -> Path:
    """A diffusers folder with a tiny Stable Diffusion XL of random weights."""
    return make_folder(folder, TINY_SDXL, seed, prediction=prediction)


def make_folder(
    folder: Path, settings: Settings, seed: int = 0, dtype: str = "float32", prediction: str = "epsilon"
) -> Path:
    """A diffusers folder with a model of these settings and random weights in the given number format.

    `prediction` is what its scheduler says that the U-Net predicts.
    """
    import torch
    from safetensors.torch import save_file

    for part in settings:
        (folder / part).mkdir(parents=True, exist_ok=True)
        config, shapes = _config_and_shapes(part, settings[part])
        _write_json(folder / part / "config.json", config)
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in random_weights(shapes, seed)}
        save_file(weights, folder / part / _WEIGHTS[part], metadata={"format": "pt"})
    tokenizers = {part.replace("text_encoder", "tokenizer"): part for part in settings if part.startswith("text_")}
    for name, part in tokenizers.items():
        _write_tokenizer(folder / name, settings[part]["pad_token_id"])
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", {**_SCHEDULER, "prediction_type": prediction})
    index: dict[str, Any] = {part: list(_MODULES[part]) for part in settings}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    if "text_encoder_2" in settings:
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        index["_class_name"] = "StableDiffusionPipeline"
    _write_json(folder / "model_index.json", index)
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

    from lorakit.models.families.sd import state_dict_keys as layout

    tensors: dict[str, Tensor] = {}
    parts = [part for part in _WEIGHTS if (folder / part).is_dir()]
    is_xl = "text_encoder_2" in parts
    for part, file in ((part, _WEIGHTS[part]) for part in parts):
        settings, stored = json.loads((folder / part / "config.json").read_text()), load_file(folder / part / file)
        if part == "text_encoder_2":
            tensors |= _big_g(stored)
            continue
        if part == "text_encoder":
            prefix = "conditioner.embedders.0.transformer." if is_xl else layout.TEXT_PREFIX
            is_clip = settings["hidden_act"] != "gelu"
            tensors |= _clip(stored, prefix) if is_clip else _open_clip(stored, settings)
            continue
        for name, tensor in stored.items():
            if part == "unet":
                original = layout.UNET_PREFIX + layout.original_unet_name(name, settings)
            else:
                original = layout.VAE_PREFIX + layout.original_vae_name(name, settings)
            is_convolution = part == "vae" and ".attentions." in name and tensor.dim() == 2
            tensors[original] = tensor[:, :, None, None] if is_convolution else tensor
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": tensors, "global_step": 0}, path)
    return path


def _clip(stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """CLIP's text encoder as single files of Stable Diffusion 1.x and XL have it."""
    import torch

    tensors = {prefix + name: tensor for name, tensor in stored.items()}
    tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    return tensors


def _open_clip(stored: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """OpenCLIP's text encoder as single files of Stable Diffusion 2.x have it, with what is not read.

    Not read are the last layer, here the one before it with another sign, the projection, and two more.
    """
    import torch

    from lorakit.models.families.sd.state_dict_keys import OPEN_CLIP_PREFIX

    layers, width = settings["num_hidden_layers"], settings["hidden_size"]
    tensors = _in_open_clip(stored)
    last, unread = (f"transformer.resblocks.{index}." for index in (layers - 1, layers))
    tensors |= {name.replace(last, unread): -tensor for name, tensor in tensors.items() if name.startswith(last)}
    tensors |= {"text_projection": torch.eye(width), "logit_scale": torch.tensor(4.6)}
    tensors["attn_mask"] = torch.full((77, 77), -torch.inf).triu(1)
    return {OPEN_CLIP_PREFIX + name: tensor for name, tensor in tensors.items()}


def _big_g(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's text encoder as single files of Stable Diffusion XL have it, whole, its projection transposed."""
    import torch

    tensors = {**_in_open_clip(stored), "logit_scale": torch.tensor(4.6)}
    tensors["text_projection"] = tensors.pop("text_projection.weight").T.contiguous()
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in tensors.items()}


def _in_open_clip(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors by the names of OpenCLIP, queries, keys and values in one."""
    import torch

    from lorakit.models.families.sd.state_dict_keys import open_clip_name

    named = {open_clip_name(name.removeprefix("text_model.")): tensor for name, tensor in stored.items()}
    fused = [name.removesuffix("[0]") for name in named if name.endswith("[0]")]
    tensors = {name: tensor for name, tensor in named.items() if not name.endswith("]")}
    return tensors | {name: torch.cat([named[f"{name}[{third}]"] for third in range(3)]) for name in fused}


def _config_and_shapes(part: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """What a part's config file says, and the shapes of its tensors under the names of its weights file."""
    from lorakit.models.weights.load import shapes_of, without_weights

    if part.startswith("text_encoder"):
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        config = CLIPTextConfig(**settings)
        shapes = shapes_of(without_weights(lambda: CLIPTextModel(config)))
        named = {f"text_model.{name}": shape for name, shape in shapes.items()}
        if part == "text_encoder_2":
            named["text_projection.weight"] = (settings["projection_dim"], settings["hidden_size"])
        return {**config.to_dict(), "architectures": [_MODULES[part][1]]}, named
    if part == "unet":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as Module
    else:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Module
    module = without_weights(lambda: Module(**settings))
    public = {key: value for key, value in module.config.items() if not key.startswith("_")}
    return {"_class_name": Module.__name__, **public}, shapes_of(module)


def _write_tokenizer(folder: Path, pad: int) -> None:
    """CLIP's tokenizer in the form that transformers reads, with the token of that id for padding."""
    from lorakit.models.families.sd.tokenizer import clip_vocabulary

    folder.mkdir(exist_ok=True)
    vocabulary, merges = clip_vocabulary()
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    end = "<|endoftext|>"
    tokens = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
    tokens["pad_token"] = next(token for token, index in vocabulary.items() if index == pad)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", tokens)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(content), indent=2, default=list), encoding="utf-8")
