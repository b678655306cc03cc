"""What kind of adapters a file holds, and for which kind of model, by the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attrs import frozen

from lorakit.checkpoints.kinds import describe
from lorakit.checkpoints.lora_names import own_name
from lorakit.checkpoints.summary import CheckpointSummary, Shapes

_ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "LoHa": ("hada_w1_a", "hada_w1_b"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"),
    "OFT": ("oft_blocks", "oft_diag", "oft_r", "oft_R"),
    "BOFT": ("boft_R", "boft_s"),
    "IA3": ("on_input", "ia3_l"),
    "GLoRA": ("a1", "b1"),
    "VeRA": ("vera_lambda_b", "vera_lambda_d"),
    "LoCon with Tucker decomposition": ("lora_mid",),
    "full difference": ("diff", "diff_b", "set_weight"),
    "LoRA with trained norms": ("w_norm", "b_norm"),
    "LoRA with embeddings": ("string_to_param", "lora_embedding_A"),
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoRA": ("lora_up", "lora_down", "lora_A", "lora_B", "lora", "lora_linear_layer"),
}
OF_LYCORIS = {"LoHa": "loha", "LoKr": "lokr", "OFT": "diag-oft", "BOFT": "boft", "IA3": "ia3", "GLoRA": "glora"}
"""Algorithms of LyCORIS, and what its argument `algo` calls them."""

_MODELS: Mapping[str, tuple[str, ...]] = {
    "FLUX": ("double_blocks", "single_blocks", "single_transformer_blocks"),
    "Stable Diffusion 3": ("joint_blocks",),
    "FLUX or Stable Diffusion 3": ("transformer_transformer_blocks",),
    "Stable Diffusion XL": ("lora_te2_", "text_encoder_2_", "_transformer_blocks_1_"),
    "AnimateDiff": ("motion_modules_",),
    "a ControlNet": ("lllite_", "control_model_"),
}
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
_WIDE_LAYER = re.compile(r"(?:attn2_to_k|layers_\d+_self_attn_q_proj)\.lora_down\.weight")
_STABLE_DIFFUSION = re.compile(
    r"(?:down|up|input|output)_blocks_\d|mid_block_|middle_block_|encoder_layers_\d+_(?:self_attn|mlp)"
)
_EMBEDDING_WIDTHS = {(768,), (1024,), (1280,)}


@frozen
class AdapterKind:
    """What a file holds."""

    algorithm: str
    """`LoRA`, `DoRA`, `LoHa`, …; empty where it holds no adapters."""
    model: str
    """`Stable Diffusion XL`, `FLUX`, …; empty where the names do not show it."""
    description: str
    """In words that fit behind "is": `a LoHa for Stable Diffusion XL`, `a Stable Diffusion 1.x model`."""


def adapter_kind(summary: CheckpointSummary) -> AdapterKind:
    """What kind of adapters a file holds; `summary` has the tensors by their names in the file."""
    algorithm = _algorithm(summary.tensors)
    if not algorithm:
        return AdapterKind("", "", _description_of_others(summary))
    model = _model(summary.tensors)
    article = "an" if algorithm[0] in "OI" else "a"
    return AdapterKind(algorithm, model, f"{article} {algorithm}" + (f" for {model}" if model else ""))


def _algorithm(tensors: Shapes) -> str:
    if any(re.fullmatch(r"(?:unet|text_encoder):\d+:(?:up|down)", name) for name in tensors):
        return "LoRA in the layout of lora-diffusion"
    if any(name.endswith(".dora_scale") and shape[:1] == (1,) != shape[1:2] for name, shape in tensors.items()):
        return "DoRA with a magnitude for each input"
    steps = {step for name in tensors for step in name.replace("_lora.", ".lora.").split(".")[1:]}
    return next((algorithm for algorithm, marks in _ALGORITHMS.items() if steps & set(marks)), "")


def _model(tensors: Shapes) -> str:
    flat = [name.replace(".", "_") for name in tensors]
    for model, marks in _MODELS.items():
        if any(mark in name for name in flat for mark in marks):
            return model
    if not any(_STABLE_DIFFUSION.search(name) for name in flat):
        return "another kind of model than Stable Diffusion"
    widths = (shape[1] for name, shape in tensors.items() if len(shape) > 1 and _WIDE_LAYER.search(own_name(name)))
    return next((_WIDTHS[width] for width in widths if width in _WIDTHS), "")


def _description_of_others(summary: CheckpointSummary) -> str:
    words = {name for name, shape in summary.tensors.items() if "." not in name and shape[-1:] in _EMBEDDING_WIDTHS}
    return "a textual inversion" if words and words == summary.tensors.keys() else describe(summary)
