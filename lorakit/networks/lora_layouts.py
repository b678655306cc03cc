"""LoRA files in the layouts that are not sd-scripts', which is the one that networks have.

Both have the names of PEFT: `lora_A` is the down factor, `lora_B` the up factor. They have no alpha, so alpha/rank is
part of `lora_B`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.api.lora_layout import LoRALayout
from lorakit.checkpoints.lora_names import ALPHA, DOWN, MAGNITUDE, UP, denoiser_key
from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.folders import TensorSlice

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
        by_key = _by_key(tensors)
        paths = _split_fused(by_key, targets)
        return to_diffusers(_named(by_key), paths)
    return to_original(tensors, {target.key: target.original_path for target in targets})


def in_dotted_layout(tensors: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors behind dotted paths of diffusers, `transformer.…`, or of the original code."""
    of_diffusers = any(path.startswith("transformer.") for path in paths.values())
    return to_diffusers(tensors, paths) if of_diffusers else to_original(tensors, paths)


def copy_in_layout(
    tensors: Mapping[str, Tensor], layout: LoRALayout, targets: Sequence[AdaptationTarget]
) -> dict[str, Tensor]:
    """The same for a copy that other tools are to read: layers are fused as they are there, and alphas are the same.

    Raises `AdapterError` for what the layout of diffusers has no place for.
    """
    if layout == "kohya":
        by_key = _by_key(tensors)
        _join_fused(by_key, targets)
        return _with_one_alpha(by_key)
    return in_layout(tensors, layout, targets)


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


def _split_fused(by_key: dict[str, dict[str, Tensor]], targets: Sequence[AdaptationTarget]) -> dict[str, str]:
    """Replace layers that diffusers has in parts by these parts; returns the paths of all layers by key."""
    paths = {target.key: target.diffusers_path for target in targets}
    for target in targets:
        own = by_key.get(target.key, {})
        if target.diffusers_path or not target.fused_from or not own or own.keys() - _KNOWN:
            continue
        del by_key[target.key]
        for rows in target.fused_from:
            key = denoiser_key(rows.name)
            by_key[key] = {
                # Files have no tensor twice, so the down factor is copied for each part.
                suffix: tensor[rows.start : rows.stop] if suffix in (UP, MAGNITUDE) else tensor.clone()
                for suffix, tensor in own.items()
            }
            paths[key] = rows.name
    return paths


def _join_fused(by_key: dict[str, dict[str, Tensor]], targets: Sequence[AdaptationTarget]) -> None:
    """Replace layers that sd-scripts has as rows of one by that one, as LoRA; others stay as they are."""
    wholes: dict[str, list[tuple[TensorSlice, dict[str, Tensor]]]] = {}
    for target in targets:
        if target.fused_in is not None and by_key.get(target.key, {}).keys() == {DOWN, UP, ALPHA}:
            wholes.setdefault(target.fused_in.name, []).append((target.fused_in, by_key.pop(target.key)))
    for name, parts in wholes.items():
        downs = [own[DOWN] for _, own in parts]
        outputs = max(own.fused_in.stop for own in targets if own.fused_in and own.fused_in.name == name)
        up, rank = downs[0].new_zeros(outputs, sum(map(len, downs))), 0
        for rows, own in parts:
            columns = slice(rank, rank + len(own[DOWN]))
            up[rows.start : rows.stop, columns] = own[UP].to(up) * (own[ALPHA].to(up) / len(own[DOWN]))
            rank = columns.stop
        by_key[denoiser_key(name) or name] = {DOWN: torch.cat(downs), UP: up, ALPHA: torch.tensor(float(rank))}


def _with_one_alpha(by_key: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by name, LoRA with the most common alpha, as some tools take that for all layers."""
    alphas = Counter(float(own[ALPHA]) for own in by_key.values() if DOWN in own)
    common = max(alphas, key=lambda alpha: (alphas[alpha], alpha), default=1.0)
    found = {key: dict(own) for key, own in by_key.items()}
    for own in found.values():
        if DOWN in own and (alpha := float(own[ALPHA])) != common:
            own[UP] = (own[UP].float() * (alpha / common)).to(own[UP].dtype)
            own[ALPHA] = torch.full_like(own[ALPHA], common)
    return _named(found)


def _named(by_key: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{key}.{suffix}": tensor for key, own in by_key.items() for suffix, tensor in own.items()}


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
