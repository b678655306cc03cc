"""Where in diffusers' pipelines and in ComfyUI the layers of Stable Diffusion are, by their keys in LoRA files.

Keys are those of sd-scripts (`lorakit.checkpoints.lora_names`), which have underscores for dots.
"""

from __future__ import annotations

import re

from lorakit.checkpoints.lora_names import DOWN, own_name, own_name_xl

_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "input_blocks", "output_blocks", "middle_block",
    "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "time_emb_proj", "conv_shortcut", "in_layers",
    "out_layers", "emb_layers", "skip_connection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_model",
    "text_projection", "conv_in", "conv_out", "time_embedding", "add_embedding", "linear_1", "linear_2",
)  # fmt: skip
"""The steps of paths that have underscores in them."""
_STEP = re.compile("|".join((*_WORDS, "[^_]+")))
_UNET = "lora_unet_"
_DIFFUSERS_STARTS = ("down_blocks_", "mid_block_", "up_blocks_", "conv_", "time_embedding_", "add_embedding_")
_ORIGINAL_STARTS = ("input_blocks_", "middle_block_", "output_blocks_")
_ENCODERS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_LARGE_KERNEL = re.compile(r"_(?:conv[12]?|in_layers_2|out_layers_3|op)$")
_SHORTCUT = re.compile(r"_(?:conv_shortcut|skip_connection)$")
_OF_TRANSFORMER = re.compile(r"_proj_(?:in|out)$")
_FIRST_UPSAMPLER = "output_blocks_2_2_conv"


def diffusers_path(key: str) -> str:
    """The path of a layer in a pipeline: `unet.down_blocks.0.attentions.0.proj_in`; empty for unknown keys."""
    if key.startswith(_UNET):
        # In the spelling of diffusers also for SDXL, whose keys have that of the original code.
        path = _renamed(key, xl=False).removeprefix(_UNET)
        return f"unet.{_dotted(path)}" if path.startswith(_DIFFUSERS_STARTS) else ""
    prefix = next((prefix for prefix in _ENCODERS if key.startswith(prefix)), "")
    return f"{_ENCODERS[prefix]}.{_dotted(key.removeprefix(prefix))}" if prefix else ""


def comfyui_path(key: str, encoder: str = "clip_l") -> str:
    """The path of a layer in ComfyUI: `diffusion_model.input_blocks.1.1.proj_in`; empty for unknown keys.

    `encoder` is what ComfyUI calls the text encoder of a family with one: `clip_l`, or `clip_h` for 2.x.
    """
    if key.startswith(_UNET):
        path = _renamed(key, xl=True).removeprefix(_UNET)
        if path == _FIRST_UPSAMPLER and path not in key:
            path = "output_blocks_2_1_conv"  # in 1.x and 2.x, the lowest level has no transformers
        return f"diffusion_model.{_dotted(path)}" if path.startswith(_ORIGINAL_STARTS) else ""
    encoders = {"lora_te_": encoder, "lora_te1_": "clip_l", "lora_te2_": "clip_g"}
    prefix = next((prefix for prefix in encoders if key.startswith(prefix)), "")
    return f"text_encoders.{encoders[prefix]}.transformer.{_dotted(key.removeprefix(prefix))}" if prefix else ""


def layer_shape(key: str, inputs: int, *, linear_projection: bool) -> tuple[int, ...]:
    """Inputs and kernel of a layer of which only their product is known: `(320,)`, `(320, 1, 1)` or `(320, 3, 3)`.

    `linear_projection` tells whether the U-Net's transformers begin and end with linear layers, as in 2.x and SDXL.
    """
    if not key.startswith(_UNET):
        return (inputs,)
    if _LARGE_KERNEL.search(key):
        return (inputs // 9, 3, 3)
    is_convolution = _SHORTCUT.search(key) or (_OF_TRANSFORMER.search(key) and not linear_projection)
    return (inputs, 1, 1) if is_convolution else (inputs,)


def _renamed(key: str, *, xl: bool) -> str:
    name = f"{key}.{DOWN}"
    return (own_name_xl(name) if xl else own_name(name)).removesuffix(f".{DOWN}")


def _dotted(path: str) -> str:
    return ".".join(_STEP.findall(path))
