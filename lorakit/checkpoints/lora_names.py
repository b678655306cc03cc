"""How LoRA files name their tensors: what diffusers, PEFT and others write, put in the words of sd-scripts.

sd-scripts calls a tensor `lora_unet_<the layer's path with underscores>.lora_down.weight`, `lora_te_text_model_…` in
the text encoder. Layers of the U-Net have the names of diffusers.
"""

from __future__ import annotations

import re

DOWN, UP, ALPHA, MAGNITUDE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"

_DOWN_OR_UP = {"A": DOWN, "B": UP, "down": DOWN, "up": UP}
_END = re.compile(r"[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.[^.]+)?\.weight$")
_MAGNITUDE_END = re.compile(r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
_PLAIN_END = re.compile(r"\.(alpha|dora_scale)$")

_UNET_STEPS = ("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks")
_DOTTED = {
    "unet.": "unet", "model.diffusion_model.": "unet", "diffusion_model.": "unet",
    "text_encoder.text_model.": "text", "text_encoder.": "text", "text_model.": "text",
    **{f"{step}.": "" for step in (*_UNET_STEPS, "encoder.layers")},
}  # fmt: skip
_OF_PROCESSORS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_SGM_BLOCK = re.compile(r"(input|output)_blocks_(\d{1,2})_(\d)_(.+)")
_SGM_MIDDLE = re.compile(r"middle_block_([012])_(.+)")
_SGM_RESNET = {
    "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
_LAYERS_PER_LEVEL = 3


def own_name(name: str) -> str:
    """What sd-scripts calls a tensor of a LoRA for Stable Diffusion 1.x or 2.x; the name itself where it is no such."""
    path, suffix = split_name(name)
    key = _own_key(path) if suffix else ""
    return f"{key}.{suffix}" if key else name


def _own_key(path: str) -> str:
    """What sd-scripts calls a layer, by the path in any tool's file; empty for what is no layer of Stable Diffusion."""
    path = path.removeprefix("base_model.model.")
    for prefix in ("lora_unet_", "lora_te_", "lora_te1_", "lycoris_"):
        if path.startswith(prefix) and "." not in path:
            path = path.removeprefix(prefix)
            if prefix == "lora_unet_" or (prefix == "lycoris_" and path.startswith(_UNET_STEPS)):
                return f"lora_unet_{_diffusers_path(path)}"
            return f"lora_te_text_model_{path.removeprefix('text_model_')}"
    for prefix, part in _DOTTED.items():
        if path.startswith(prefix):
            return _dotted_key(path.removeprefix(prefix) if part else path, part)
    return ""


def split_name(name: str) -> tuple[str, str]:
    """The path of a tensor's layer, and what sd-scripts calls such a tensor; empty where it is of no known kind."""
    if match := _END.search(name):
        return name[: match.start()], _DOWN_OR_UP[match[1]]
    if match := _MAGNITUDE_END.search(name):
        return name[: match.start()], MAGNITUDE
    if match := _PLAIN_END.search(name):
        return name[: match.start()], match[1]
    return name.partition(".")[0], name.partition(".")[2] if name.startswith(("lora_", "lycoris_")) else ""


def _dotted_key(path: str, part: str) -> str:
    """The key of a layer by its path in its part, which shows by the path where nothing else says it."""
    is_text = part == "text" or (not part and path.startswith("encoder."))
    path = path.replace(".processor.", ".")
    stem, _, leaf = path.rpartition(".")
    if is_text:
        return f"lora_te_text_model_{f'{stem}.{_OF_PROCESSORS.get(leaf, leaf)}'.replace('.', '_')}"
    if leaf == "to_out":
        path = f"{path}.0"
    return f"lora_unet_{_diffusers_path(path.replace('.', '_'))}"


def _diffusers_path(path: str) -> str:
    """The path in diffusers' U-Net, with underscores, of a layer that may have the name of the original code."""
    if match := _SGM_MIDDLE.fullmatch(path):
        place, leaf = int(match[1]), match[2]
        if place == 1:
            return f"mid_block_attentions_0_{leaf}"
        return f"mid_block_resnets_{place // 2}_{_SGM_RESNET.get(leaf, leaf)}"
    match = _SGM_BLOCK.fullmatch(path)
    if match is None:
        return path
    side, number, slot, leaf = match[1], int(match[2]) - (match[1] == "input"), match[3], match[4]
    level, index = divmod(number, _LAYERS_PER_LEVEL)
    places = {"op": "downsamplers_0_conv", "conv": "upsamplers_0_conv"}
    inner = f"resnets_{index}_{_SGM_RESNET.get(leaf, leaf)}" if slot == "0" else f"attentions_{index}_{leaf}"
    return f"{'down' if side == 'input' else 'up'}_blocks_{level}_{places.get(leaf, inner)}"
