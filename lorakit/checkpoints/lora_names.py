"""How LoRA files name their tensors: what diffusers, PEFT and others write, put in the words of sd-scripts.

sd-scripts calls a tensor `lora_unet_<the layer's path with underscores>.lora_down.weight`, `lora_te_text_model_…` in
the text encoder; SDXL's are `lora_te1_…` and `lora_te2_…`. Layers of the U-Net have the names of diffusers, in SDXL
those of the original code.
"""

from __future__ import annotations

import re

DOWN, UP, ALPHA, MAGNITUDE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"

_DOWN_OR_UP = {"A": DOWN, "B": UP, "down": DOWN, "up": UP}
_END = re.compile(r"[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.[^.]+)?\.weight$")
_MAGNITUDE_END = re.compile(r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
_PLAIN_END = re.compile(r"\.(alpha|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))$")

_UNET_STEPS = ("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks")
_DOTTED = {
    "unet.": "unet", "model.diffusion_model.": "unet", "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.text_model.": "text", "text_encoders.clip_h.transformer.text_model.": "text",
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

_DENOISERS = (
    "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "lycoris_", "lora_transformer_",
)  # fmt: skip
"""What tools put in front of the paths of a denoiser's layers."""

_DIFFUSERS_BLOCK = re.compile(r"(down|up)_blocks_(\d)_(resnets|attentions|downsamplers|upsamplers)_(\d)_(.+)")
_DIFFUSERS_MIDDLE = re.compile(r"mid_block_(resnets|attentions)_(\d)_(.+)")
_TO_SGM_RESNET = {leaf: original for original, leaf in _SGM_RESNET.items()}
_XL_TEXT = {
    "lora_te2_": "lora_te2_", "text_encoder_2.": "lora_te2_",
    "text_encoders.clip_g.transformer.": "lora_te2_", "text_encoders.clip_l.transformer.": "lora_te1_",
    "lora_te1_": "lora_te1_", "lora_te_": "lora_te1_", "text_encoder.": "lora_te1_",
}  # fmt: skip


def own_name(name: str) -> str:
    """What sd-scripts calls a tensor of a LoRA for Stable Diffusion 1.x or 2.x; the name itself where it is no such."""
    path, suffix = split_name(name)
    key = _own_key(path) if suffix else ""
    return f"{key}.{suffix}" if key else name


def own_name_xl(name: str) -> str:
    """What sd-scripts calls a tensor of a LoRA for Stable Diffusion XL; the name itself where it is no such."""
    path, suffix = split_name(name)
    path = path.removeprefix("base_model.model.")
    for start, prefix in _XL_TEXT.items() if suffix else ():
        if path.startswith(start):
            inner = path.removeprefix(start).replace("text_model_", "text_model.", 1).removeprefix("text_model.")
            key = _dotted_key(inner, "text") if "." in inner else f"lora_te_text_model_{inner}"
            return f"{prefix}{key.removeprefix('lora_te_')}.{suffix}"
    key = _own_key(path) if suffix else ""
    if key.startswith("lora_unet_"):
        return f"lora_unet_{_sgm_path(key.removeprefix('lora_unet_'))}.{suffix}"
    return f"{key}.{suffix}" if key else name


def denoiser_key(path: str) -> str:
    """The key of a layer of a denoiser of any family, whose path is as dotted as its module's; empty for other paths.

    `diffusion_model.blocks.0.attn.to_q` and `lycoris_blocks_0_attn_to_q` are `lora_unet_blocks_0_attn_to_q`.
    """
    bare = path.removeprefix("base_model.model.")
    prefix = next((prefix for prefix in _DENOISERS if bare.startswith(prefix)), "")
    if not prefix and bare == path:
        return ""
    return f"lora_unet_{bare.removeprefix(prefix).replace('.', '_')}"


def plain_path(path: str) -> str:
    """The path of a layer without what attention processors of older versions of diffusers put into it."""
    path = path.removeprefix("base_model.model.").replace(".processor.", ".")
    return f"{path}.0" if path.endswith(".to_out") else path


def _sgm_path(path: str) -> str:
    """The path in the original code, with underscores, of a layer that has its name of diffusers."""
    if match := _DIFFUSERS_MIDDLE.fullmatch(path):
        kind, index, leaf = match.groups()
        return f"middle_block_{2 * int(index) if kind == 'resnets' else 1}_{_TO_SGM_RESNET.get(leaf, leaf)}"
    match = _DIFFUSERS_BLOCK.fullmatch(path)
    if match is None:
        return path
    side, level, kind, index, leaf = match.groups()
    number = _LAYERS_PER_LEVEL * int(level) + int(index) + (side == "down")
    match kind:
        case "resnets":
            slot, leaf = 0, _TO_SGM_RESNET.get(leaf, leaf)
        case "attentions":
            slot = 1
        case "downsamplers":
            number, slot, leaf = number + 2, 0, "op"
        case _:
            number, slot = number + 2, 2
    return f"{'input' if side == 'down' else 'output'}_blocks_{number}_{slot}_{leaf}"


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
