"""Metadata of LoRA files about their network, with the names of sd-scripts' `networks.lora`."""

from __future__ import annotations

import json
from collections.abc import Mapping

LORA_MODULE = "networks.lora"
"""sd-scripts' network module, the name by which tools know LoRA networks."""

LYCORIS_MODULE = "lycoris.kohya"
"""LyCORIS' network module, the name by which tools know LoHa and LoKr."""

NETWORK_ARG_KEYS: Mapping[str, str] = {
    "conv_dim": "conv_rank",
    "conv_alpha": "conv_alpha",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "block_dims": "block_ranks",
    "block_alphas": "block_alphas",
    "conv_block_dims": "conv_block_ranks",
    "conv_block_alphas": "conv_block_alphas",
    "down_lr_weight": "down_lr_weight",
    "mid_lr_weight": "mid_lr_weight",
    "up_lr_weight": "up_lr_weight",
    "block_lr_zero_threshold": "block_lr_zero_threshold",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio": "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio": "loraplus_text_encoder_lr_ratio",
    "rank_stabilized": "rank_stabilized",
    "dora_wd": "dora",
    "layers": "layers",
}
"""Arguments in `ss_network_args`, and the keys of [network] that they come from."""


def network_args(values: Mapping[str, object]) -> dict[str, str]:
    """The metadata entry `ss_network_args` with the values that are set; no entry if none is."""
    given = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
        if value
    }
    return {"ss_network_args": json.dumps(given)} if given else {}
