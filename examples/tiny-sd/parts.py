"""The model's parts: how large they are, how they start, and how they are written as a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.models.weights.load import shapes_of
from lorakit.testing.models import make_folder, random_weights
from lorakit.utils.rng import derived_seed

SETTINGS: dict[str, dict[str, Any]] = {
    "vae": {
        "sample_size": 64,
        "block_out_channels": [16, 32, 64, 72],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "unet": {
        "sample_size": 8,
        "block_out_channels": [64, 64, 64, 72],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 48,
    },
    "text_encoder": {
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
        "hidden_act": "quick_gelu",
    },
}
"""Arguments of each part's module. The layout is Stable Diffusion 1.x's: four levels, transformers at the upper three.

Groups and heads are as a single file's shapes tell them: groups by the channels' common divisor, four heads of text.
"""

_FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_TOKENS = "embeddings.token_embedding.weight"
_TOKEN_SCALE = 25
"""Makes the random embeddings 0.5 large: as large as what the layers add to them, since they are never trained."""
_LOG_VARIANCE = -6.0
"""Of the latents' noise at the start: a tenth of what pictures differ by, so that the decoder learns at once."""


def build(part: str, seed: int) -> nn.Module:
    """One part with random weights, float32.

    Token embeddings stay as they are: random vectors are nearly orthogonal, so layers can tell them apart, and
    a made-up name starts from the same kind of vector as the words that were learned.
    """
    module = _empty(part)
    weights = dict(random_weights(shapes_of(module), derived_seed(seed, "weights", part)))
    if part == "text_encoder":
        weights[_TOKENS] *= _TOKEN_SCALE
    if part == "vae":
        weights["quant_conv.weight"][4:] = 0
        weights["quant_conv.bias"][4:] = _LOG_VARIANCE
    module.load_state_dict(weights, strict=False)
    return module


def _empty(part: str) -> nn.Module:
    module = _module(part)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name != _TOKENS)
    return module


def _module(part: str) -> nn.Module:
    settings = SETTINGS[part]
    if part == "text_encoder":
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**settings))
    if part == "unet":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel(**settings)
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(**settings)


def save(folder: Path, parts: Mapping[str, nn.Module], prediction: str = "epsilon") -> Path:
    """Write the parts as a diffusers folder in float16; parts that are not given are random there."""
    make_folder(folder, SETTINGS, dtype="float16", prediction=prediction)
    for part, module in parts.items():
        prefix = "text_model." if part == "text_encoder" else ""
        weights = {f"{prefix}{name}": tensor.half().contiguous() for name, tensor in module.state_dict().items()}
        save_file(
            {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")},
            folder / part / _FILES[part],
            metadata={"format": "pt"},
        )
    return folder


def load(folder: Path, part: str) -> nn.Module:
    """One part of a folder that `save` wrote, float32."""
    stored = load_file(folder / part / _FILES[part])
    module = _empty(part)
    weights = {name.removeprefix("text_model."): tensor.float() for name, tensor in stored.items()}
    module.load_state_dict(weights, strict=False)
    return module
