"""Which kind of base model a LoRA file is for, by the names and shapes of its tensors, and by its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorakit.checkpoints.lora_names import DOWN, UP, own_name, split_name
from lorakit.checkpoints.summary import CheckpointSummary, Shapes

OTHER = "another kind of model than Stable Diffusion"
"""What messages call files whose tensor names match no known model."""
_OR = " or "
_ANY_FLUX, _ANY_JOINT = "FLUX.1, FLUX.2 or Chroma", "FLUX.1, Chroma, Stable Diffusion 3 or Qwen-Image"

_NAMES: Mapping[str, re.Pattern[str]] = {
    "FLUX.2": re.compile(
        r"(?:double|single)_stream_modulation|_to_qkv_mlp_proj|(?<!single_)transformer_blocks_\d+_ff(?:_context)?_linear_"
    ),
    "Chroma": re.compile(r"distilled_guidance_layer"),
    _ANY_FLUX: re.compile(r"double_blocks|single_blocks|single_transformer_blocks"),
    "Stable Diffusion 3": re.compile(r"joint_blocks"),
    "Krea 2": re.compile(
        r"(?:^|_)blocks_\d+_attn_w[qkvo](?:_|$)|txtfusion|text_fusion|transformer_blocks_\d+_attn_to_gate"
    ),
    "Anima": re.compile(
        r"(?:^|_)blocks_\d+_(?:(?:self|cross)_attn_(?:[qkv]|output)_proj|mlp_layer[12])|llm_adapter|text_conditioner"
    ),
    "Qwen-Image": re.compile(
        r"transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)|diffusion_model_transformer_blocks_\d+_attn_"
    ),
    _ANY_JOINT: re.compile(r"transformer_blocks_\d+_attn_add_q_proj"),
    "Wan": re.compile(r"(?:^|_)blocks_\d+_(?:(?:self|cross)_attn_[qkvo]|ffn_[02])(?![a-z_])"),
    "Z-Image": re.compile(
        r"(?:^|_)(?:layers|noise_refiner|context_refiner)_\d+_(?:attention_(?:to_|qkv|out)|feed_forward_w[123]|adaLN)"
    ),
    "FLUX.1, Chroma or Stable Diffusion 3": re.compile(r"transformer_transformer_blocks_\d+_(?:attn_|ff_|norm)"),
    "Stable Diffusion XL": re.compile(r"lora_te2_|text_encoder_2_|text_encoders_clip_g_|\d_transformer_blocks_1_"),
    "AnimateDiff": re.compile(r"motion_modules_"),
    "a ControlNet": re.compile(r"lllite_|control_model_"),
}
"""What names have in them, with underscores for dots, by the model; a file is for the first that matches."""
_MODULATION = re.compile(r"_(?:img|txt)_mod_lin|_modulation_lin|_norm1?(?:_context)?_linear")
"""Layers that FLUX.1 has and Chroma has not."""
_FLUX2_RATIOS = ((re.compile(r"single_blocks_\d+_linear1$"), 9), (re.compile(r"_(?:img|txt)_mlp_0$"), 6))
"""Layers of FLUX.2, and how many times as many outputs as inputs they have; in FLUX.1 it is 7 and 4 times."""
_FLUX2_WIDTHS = (4096, 6144)
_WIDE_IN_FLUX = re.compile(r"_(?:(?:img|txt)_attn_qkv|attn_to_[qkv]|linear1)$")
_LUMINA_WIDTH, _QWEN_BLOCKS = 2304, 38
"""The width of Lumina 2, whose layers are called as Z-Image's; and the number from which blocks are Qwen-Image's."""

_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
_WIDE_LAYER = re.compile(
    r"(.*(?:attn2_to_k|layers_\d+_self_attn_q_proj))\.(lora_down\.weight|hada_w1_b|lokr_w1(?:_b)?)"
)
_STABLE_DIFFUSION = re.compile(
    r"(?:down|up|input|output)_blocks_\d|mid_block_|middle_block_|encoder_layers_\d+_(?:self_attn|mlp)"
)
_STATED = {
    "sdxl": "Stable Diffusion XL", "stable-diffusion-xl": "Stable Diffusion XL",
    "sd_v2": "Stable Diffusion 2.x", "stable-diffusion-v2": "Stable Diffusion 2.x",
    "sd_v1": "Stable Diffusion 1.x", "stable-diffusion-v1": "Stable Diffusion 1.x",
    "sd3": "Stable Diffusion 3", "stable-diffusion-3": "Stable Diffusion 3",
    "flux1": "FLUX.1", "flux-1": "FLUX.1", "flux.1": "FLUX.1",
    "flux2": "FLUX.2", "flux-2": "FLUX.2", "flux.2": "FLUX.2",
    "zimage": "Z-Image", "z-image": "Z-Image", "krea2": "Krea 2", "krea-2": "Krea 2", "anima": "Anima",
    "qwen_image": "Qwen-Image", "qwen-image": "Qwen-Image", "lumina2": "Lumina 2", "lumina-2": "Lumina 2",
    "chroma": "Chroma", "wan": "Wan",
}  # fmt: skip
"""What metadata call the models, by its beginning, in lower case."""


def model_of_adapters(summary: CheckpointSummary) -> str:
    """The model that a file's adapters are for; several with "or" between them, and empty where nothing shows it."""
    found, stated = _by_names(summary.tensors), stated_model(summary.metadata)
    return stated if stated and (found == OTHER or stated in alternatives(found)) else found


def alternatives(model: str) -> list[str]:
    """The models that a title names: both of `FLUX.1 or Chroma`."""
    return model.replace(", ", _OR).split(_OR)


def stated_model(metadata: Mapping[str, str]) -> str:
    """The model that metadata say a file is for; empty where they do not."""
    stated = [metadata.get(key, "").lower() for key in ("ss_base_model_version", "modelspec.architecture")]
    return next((model for start, model in _STATED.items() if any(text.startswith(start) for text in stated)), "")


def _by_names(tensors: Shapes) -> str:
    flat = set(map(_flat_path, tensors))
    model = next((model for model, names in _NAMES.items() if any(map(names.search, flat))), "")
    if model == _ANY_FLUX:
        return _flux(tensors, flat)
    if model == _ANY_JOINT:
        numbers = (re.search(r"transformer_blocks_(\d+)_", name) for name in flat)
        return "Qwen-Image" if max(int(found[1]) for found in numbers if found) >= _QWEN_BLOCKS else model
    if model == "Z-Image":
        is_lumina = any(inputs == _LUMINA_WIDTH for path, (inputs, _) in _sides(tensors) if "attention" in path)
        return "Lumina 2" if is_lumina else model
    return model or _stable_diffusion(tensors, flat)


def _flat_path(name: str) -> str:
    """The path of a tensor's layer with underscores; all of the name where it does not end as adapters' do."""
    path, suffix = split_name(name)
    return (path if suffix else name).replace(".", "_")


def _stable_diffusion(tensors: Shapes, flat: set[str]) -> str:
    if not any(map(_STABLE_DIFFUSION.search, flat)):
        return OTHER
    widths = (_width(own_name(name), shape, tensors) for name, shape in tensors.items() if len(shape) > 1)
    return next((_WIDTHS[width] for width in widths if width in _WIDTHS), "")


def _sides(tensors: Shapes) -> list[tuple[str, tuple[int, int]]]:
    """Inputs and outputs of layers with adapters of LoRA, by the path with underscores; 0 where there is no factor."""
    found: dict[str, list[int]] = {}
    for name, shape in tensors.items():
        path, suffix = split_name(name)
        if suffix in (DOWN, UP) and len(shape) > 1:
            sides = found.setdefault(path.replace(".", "_"), [0, 0])
            sides[suffix == UP] = shape[0 if suffix == UP else 1]
    return [(path, (inputs, outputs)) for path, (inputs, outputs) in found.items()]


def _flux(tensors: Shapes, flat: set[str]) -> str:
    """Which of the models with double and single blocks it is: their layers have the same names, other sizes."""
    for path, (inputs, outputs) in _sides(tensors):
        if inputs in _FLUX2_WIDTHS and _WIDE_IN_FLUX.search(path):
            return "FLUX.2"
        ratio = next((ratio for names, ratio in _FLUX2_RATIOS if names.search(path)), 0)
        if ratio and inputs and outputs:
            is_flux2 = outputs == ratio * inputs
            return "FLUX.2" if is_flux2 else "FLUX.1" if any(map(_MODULATION.search, flat)) else "FLUX.1 or Chroma"
    return "FLUX.1" if any(map(_MODULATION.search, flat)) else _ANY_FLUX


def _width(name: str, shape: tuple[int, ...], tensors: Shapes) -> int:
    """How many inputs the layer has that a tensor is for, where that tells the model; else 0."""
    match = _WIDE_LAYER.fullmatch(name)
    if match is None:
        return 0
    if not match[2].startswith("lokr"):
        return shape[1]
    # The sides of a Kronecker product multiply.
    second = next((tensors[own] for own in (f"{match[1]}.lokr_w2", f"{match[1]}.lokr_w2_b") if own in tensors), ())
    return shape[1] * second[1] if len(second) > 1 else 0
