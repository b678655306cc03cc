"""LoRA in the layout of PEFT, with the names that diffusers' pipelines have for layers.

`lora_A` is the down factor, `lora_B` the up factor. The layout has no alpha, so alpha/rank is part of `lora_B`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorakit.errors import AdapterError

_KNOWN = {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}


def to_diffusers(tensors: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a LoRA or DoRA file as `load_lora_weights` of diffusers' pipelines takes them.

    `paths` gives each layer's path in a pipeline, `unet.mid_block.…`, by its key in LoRA files. Raises `AdapterError`
    for layers whose path is not known, and for other algorithms.
    """
    converted: dict[str, Tensor] = {}
    for key in dict.fromkeys(name.partition(".")[0] for name in tensors):
        own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == key}
        if other := sorted(own.keys() - _KNOWN):
            raise AdapterError(f"{key}.{other[0]} is no part of a LoRA; diffusers' layout has nothing like it")
        if not paths.get(key):
            raise AdapterError(f"{key} is a layer that diffusers' pipelines have no name for")
        down, up = own["lora_down.weight"], own["lora_up.weight"]
        scale = own["alpha"].float() / len(down)
        converted[f"{paths[key]}.lora_A.weight"] = down
        converted[f"{paths[key]}.lora_B.weight"] = (up.float() * scale).to(up.dtype)
        if "dora_scale" in own:
            shape = (1, -1, 1, 1) if down.ndim == 4 else (-1,)
            # PEFT's name in files, but for text encoders the name of PEFT's parameter, which PEFT takes too:
            # transformers 5 reads adapters of text encoders itself, and finds no magnitudes under the name in files.
            end = ".weight" if paths[key].startswith("text_encoder") else ""
            converted[f"{paths[key]}.lora_magnitude_vector{end}"] = own["dora_scale"].view(shape)
    return converted
