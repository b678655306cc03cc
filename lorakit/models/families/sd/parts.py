"""The parts of Stable Diffusion 1.x and 2.x that adapters can be for, and how its blocks are numbered."""

from __future__ import annotations

from lorakit.api.block_layout import BlockLayout
from lorakit.api.components import ModelPart

UNET = ModelPart(
    "unet",
    title="U-Net",
    lora_prefix="lora_unet_",
    lora_layers=(
        *(f"attn{number}_to_{name}" for number in (1, 2) for name in ("q", "k", "v", "out_0")),
        "ff_net_0_proj",
        "ff_net_2",
        "proj_in",
        "proj_out",
    ),
)
TEXT_ENCODER = ModelPart(
    "text_encoder",
    title="text encoder",
    encoders=(0,),
    lora_prefix="lora_te",
    lora_layers=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
)

LAYOUT = BlockLayout(25, {"down": range(12), "mid": range(12, 13), "up": range(13, 25)})
"""As sd-scripts has it: layer j of level i is 1 + 3i + j on the way down and 13 + 3i + j on the way up."""
