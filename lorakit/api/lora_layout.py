"""The layouts that LoRA files are written in; imports no torch."""

from __future__ import annotations

from typing import Literal

LoRALayout = Literal["kohya", "original", "diffusers"]
"""What LoRA files call layers and their tensors.

`kohya`, sd-scripts' layout: `lora_unet_blocks_0_attn_to_q.lora_down.weight`, `….lora_up.weight` and `….alpha`.
`original`: `diffusion_model.blocks.0.attn.to_q.lora_A.weight` and `….lora_B.weight`, the dotted path in the original
code, without alphas. `diffusers`: the same behind the path in a pipeline, `transformer.blocks.0.attn.to_q`.
"""
