"""LoRA files in the layouts that are not sd-scripts', which is the one that networks have.

Both have the names of PEFT: `lora_A` is the down factor, `lora_B` the up factor. They have no alpha, so alpha/rank is
part of `lora_B`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lorakit.api.lora_layout import LoRALayout
from lorakit.checkpoints.lora_names import ALPHA, DOWN, MAGNITUDE, UP
from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget

_KNOWN = {DOWN, UP, ALPHA, MAGNITUDE}
_PEFT = {DOWN: "lora_A.weight", UP: "lora_B.weight"}


def in_layout(
    tensors: Mapping[str, Tensor], layout: LoRALayout, targets: Sequence[AdaptationTarget]
) -> dict[str, Tensor]:
    """The tensors of a network, by sd-scripts' names, as a file in a layout has them; `targets` are its layers.

    Raises `AdapterError` for what the layout of diffusers has no place for.
    """
    if layout == "kohya":
        return dict(tensors)
    if layout == "diffusers":
        return to_diffusers(*_in_parts(tensors, targets))
    return to_original(tensors, {target.key: target.original_path for target in targets})


def _in_parts(
    tensors: Mapping[str, Tensor], targets: Sequence[AdaptationTarget]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors with a layer of its own for each part that diffusers has of a fused one, and the paths by key.

    W + U·D has the rows W₁ + U₁·D: all parts share the down factor, of which each gets a copy.
    """
    found, paths = dict(tensors), {target.key: target.diffusers_path for target in targets}
    own = _by_key(tensors)
    for target in targets:
        if target.diffusers_path or not target.fused_from:
            continue
        for suffix, tensor in own.get(target.key, {}).items():
            del found[f"{target.key}.{suffix}"]
            for rows in target.fused_from:
                key = rows.name.replace(".", "_")
                paths[key] = rows.name
                part = tensor[rows.start : rows.stop] if suffix in (UP, MAGNITUDE) else tensor
                found[f"{key}.{suffix}"] = part.clone()
    return found, paths


def to_original(tensors: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors behind the dotted paths that the original code has for layers, `diffusion_model.blocks.0.…`.

    Magnitudes of DoRA, and tensors of LoHa and LoKr with their alpha, keep their names behind the path, as ComfyUI
    reads them. A layer without a path, as in a text encoder, keeps its key and the names of its factors.
    """
    converted: dict[str, Tensor] = {}
    for key, own in _by_key(tensors).items():
        names = _PEFT if paths.get(key) else {}
        converted |= {f"{paths.get(key) or key}.{names.get(end, end)}": own for end, own in _without_alpha(own).items()}
    return converted


def to_diffusers(tensors: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a LoRA or DoRA file as `load_lora_weights` of diffusers' pipelines takes them.

    `paths` gives each layer's path in a pipeline, `unet.mid_block.…`, by its key in LoRA files. Raises `AdapterError`
    for layers whose path is not known, and for other algorithms.
    """
    converted: dict[str, Tensor] = {}
    for key, own in _by_key(tensors).items():
        if other := sorted(own.keys() - _KNOWN):
            raise AdapterError(f"{key}.{other[0]} is no part of a LoRA; diffusers' layout has nothing like it")
        if not paths.get(key):
            raise AdapterError(f"{key} is a layer that diffusers' pipelines have no name for")
        for suffix, tensor in _without_alpha(own).items():
            if suffix != MAGNITUDE:
                converted[f"{paths[key]}.{_PEFT[suffix]}"] = tensor
                continue
            shape = (1, -1, 1, 1) if own[DOWN].ndim == 4 else (-1,)
            # PEFT's name in files, but for text encoders the name of PEFT's parameter, which PEFT takes too:
            # transformers 5 reads adapters of text encoders itself, and finds no magnitudes under the name in files.
            end = ".weight" if paths[key].startswith("text_encoder") else ""
            converted[f"{paths[key]}.lora_magnitude_vector{end}"] = tensor.view(shape)
    return converted


def _by_key(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by what is behind its key."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, suffix = name.partition(".")
        found.setdefault(key, {})[suffix] = tensor
    return found


def _without_alpha(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer, of LoRA and DoRA with alpha/rank in the up factor; those of others as they are."""
    if DOWN not in own:
        return dict(own)
    scale, up = own[ALPHA].float() / len(own[DOWN]), own[UP]
    folded = {**own, UP: (up.float() * scale).to(up.dtype)}
    del folded[ALPHA]
    return folded
