"""The parts of Anima, their blocks, and what diffusers and LoRA files call their layers; imports no torch.

The original code's names are the modules' own: `blocks.0.self_attn.q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from lorakit.api.block_layout import BlockLayout
from lorakit.api.components import ModelPart
from lorakit.models.families.flow.checkpoint import TRANSFORMER as _NAME

TRANSFORMER = ModelPart(_NAME, title="transformer", lora_prefix="lora_unet_blocks_")
CONDITIONER = ModelPart(
    "text_conditioner", title="LLM adapter", encoders=(1,), lora_prefix="lora_unet_llm_adapter_blocks_"
)
LAYOUT = BlockLayout(28, {"blocks": range(28)})

_MODULATIONS = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
_DIFFUSERS_LAYERS = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1": "time_embed.t_embedder",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
    "blocks": "transformer_blocks",
}
"""What diffusers calls what is at the top of the transformer."""
_DIFFUSERS_BLOCK = {
    **{
        f"adaln_modulation_{layer}.{number}": f"{norm}.linear_{number}"
        for layer, norm in _MODULATIONS.items()
        for number in (1, 2)
    },
    **{
        f"{original}.{layer}": f"{own}.{name}"
        for original, own in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for layer, name in (
            ("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("output_proj", "to_out.0"),
            ("q_norm", "norm_q"), ("k_norm", "norm_k"),
        )
    },
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
}  # fmt: skip
"""What it calls what is in a block."""


def _renaming(tops: Mapping[str, str], in_block: Mapping[str, str]) -> Callable[[str], str]:
    """Renames a layer or tensor by what it is at the top, and in a block behind the block's number."""
    top, layer = ("|".join(map(re.escape, names)) for names in (tops, in_block))
    pattern = re.compile(rf"({top})(?:(\.\d+\.)({layer}))?(?=\.|$)")

    def rename(name: str) -> str:
        found = pattern.match(name)
        if found is None:
            return name
        own, number, inner = found.groups(default="")
        return tops[own] + number + in_block.get(inner, "") + name[found.end() :]

    return rename


diffusers_name = _renaming(_DIFFUSERS_LAYERS, _DIFFUSERS_BLOCK)
"""What diffusers calls a layer or tensor of the transformer: `transformer_blocks.0.attn1.to_q`."""
original_name = _renaming(
    *({own: name for name, own in names.items()} for names in (_DIFFUSERS_LAYERS, _DIFFUSERS_BLOCK))
)
"""What the original code calls one that diffusers has: `blocks.0.self_attn.q_proj`; other names stay."""


def transformer_key(path: str) -> str:
    """The name in sd-scripts' LoRA files of a layer, by its path in the transformer."""
    return f"lora_unet_{path.replace('.', '_')}"


def conditioner_key(path: str) -> str:
    """The name in sd-scripts' LoRA files of a layer, by its path in the LLM adapter."""
    return f"lora_unet_llm_adapter_{path.replace('.', '_')}"
