"""Converting a LoRA file between the layouts of sd-scripts, diffusers and ComfyUI.

Names are all that differs, except for alpha: the layout of diffusers has none, so alpha/rank is multiplied into its up
factors. What they were is noted in the metadata, so that the way back gives the same file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from lorakit.checkpoints.lora_names import ALPHA, DOWN, MAGNITUDE, UP
from lorakit.checkpoints.lora_paths import comfyui_path, diffusers_path
from lorakit.errors import AdapterError
from lorakit.lora_tools.adapters import AnyPath, LoRAFile, open_lora
from lorakit.lora_tools.metadata import json_object
from lorakit.lora_tools.output import new_file, write_lora
from lorakit.networks.lora_layouts import to_diffusers, to_original
from lorakit.utils.wording import some

Layout = Literal["kohya", "diffusers", "comfyui"]
"""Whose names tensors have: those of sd-scripts, which nearly all tools read, of diffusers, or of ComfyUI."""

_NOTE = "lorakit_alphas"
"""The key of metadata with the alphas that the layout of diffusers has no place for."""
_OF_PEFT = "lora_adapter_metadata"


@frozen
class Converted:
    """A LoRA file in another layout."""

    path: Path
    """The file."""
    rounded: tuple[str, ...]
    """Keys of layers whose numbers are not exactly those of the source, as alpha/rank is no power of two."""


def convert(file: AnyPath, output: AnyPath, *, to: Layout) -> Converted:
    """Write a LoRA or DoRA file in the layout of another tool; its numbers stay what they are.

    Raises `AdapterError` for other algorithms, and for layers that the tool has no name for.
    """
    target, source = new_file(output), open_lora(file)
    source.require_lora()
    path_of = _paths(source, to)
    unknown = [key for key in source.keys if not path_of[key]]
    if unknown:
        what = f"{source.path} has adapters for layers that {to} has no name for: {some(unknown)}"
        why = "Of other models than Stable Diffusion, layers keep the names that the file has for them"
        raise AdapterError(
            f"{what}. {why}; copies in other layouts are written in training, by the observer diffusers."
        )
    for key in source.keys:
        source.adapter(key)  # raises where its factors do not fit each other
    stored = {name: source.tensor(name).clone() for name in source.names.shapes}
    metadata = {key: text for key, text in source.summary.metadata.items() if not key.startswith((_OF_PEFT, "sshs_"))}
    note = metadata.pop(_NOTE, None)
    if to == "diffusers" or (to == "comfyui" and not source.is_stable_diffusion):
        tensors, rounded, alphas = _folded(source, stored)
        paths = {key: path for key, path in path_of.items() if path}
        if alphas:
            metadata[_NOTE] = json.dumps(alphas)
        write_lora(target, (to_diffusers if to == "diffusers" else to_original)(tensors, paths), metadata)
        return Converted(target, rounded)
    whole, rounded = _with_alphas(source, stored, note)
    named = {path_of[name.partition(".")[0]] + "." + name.partition(".")[2]: own for name, own in whole.items()}
    write_lora(target, named, metadata)
    return Converted(target, rounded)


def _paths(file: LoRAFile, to: Layout) -> dict[str, str]:
    if to == "kohya":
        return {key: key for key in file.keys}
    if not file.is_stable_diffusion:
        start = "transformer." if to == "diffusers" else "diffusion_model."
        return {key: path if (path := file.paths.get(key, "")).startswith(start) else "" for key in file.keys}
    if to == "diffusers":
        return {key: diffusers_path(key) for key in file.keys}
    encoder = "clip_h" if file.family == "Stable Diffusion 2.x" else "clip_l"
    return {key: comfyui_path(key, encoder) for key in file.keys}


def _folded(
    file: LoRAFile, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, object]]:
    """The tensors with alpha/rank in the up factors, alphas of scale 1; which were rounded; a note for the way back.

    The note is empty if there were no alphas. Where 16 bits cannot hold the product so that division gives the factor
    again, it is kept in 32.
    """
    tensors, rounded = dict(stored), []
    alphas: dict[str, float] = {}
    for key in file.keys:
        up, rank = stored[f"{key}.{UP}"], len(stored[f"{key}.{DOWN}"])
        alpha = file.alpha(key, rank)
        tensors[f"{key}.{ALPHA}"] = torch.tensor(float(rank))
        if f"{key}.{ALPHA}" in stored:
            alphas[key] = alpha
        if alpha == rank:
            continue
        product = up.float() * (alpha / rank)
        exact = [
            own for own in (product.to(up.dtype), product) if torch.equal(_divided(own, alpha, rank, up.dtype), up)
        ]
        tensors[f"{key}.{UP}"] = exact[0] if exact else product.to(up.dtype)
        if not exact:
            rounded.append(key)
    if not alphas:
        return tensors, (), {}
    first = next(iter(alphas))
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    note = {
        "alpha": alpha,
        "others": {key: own for key, own in alphas.items() if own != alpha},
        "dtypes": [str(stored[f"{first}.{part}"].dtype).removeprefix("torch.") for part in (UP, ALPHA)],
    }
    return tensors, tuple(rounded), note


def _divided(up: Tensor, alpha: float, rank: int, dtype: torch.dtype) -> Tensor:
    return (up.float() / (alpha / rank)).to(dtype) if alpha else up.to(dtype)


def _with_alphas(
    file: LoRAFile, stored: Mapping[str, Tensor], note: str | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors with an alpha for each layer, and the keys of layers that were rounded.

    Files that have alphas keep them. Else they are those of the note, or one for the whole file, as diffusers applies
    the most common alpha to all attention layers: the up factors of layers with other ranks make up for it.
    """
    missing = [key for key in file.keys if f"{key}.{ALPHA}" not in stored]
    tensors = dict(stored)
    if not missing:
        return tensors, ()
    noted = _noted(note, file)
    scales = {key: file.alpha(key, len(stored[f"{key}.{DOWN}"])) / len(stored[f"{key}.{DOWN}"]) for key in missing}
    common = max(scales[key] * len(stored[f"{key}.{DOWN}"]) for key in missing)
    rounded = []
    for key in missing:
        up, rank = stored[f"{key}.{UP}"], len(stored[f"{key}.{DOWN}"])
        alpha, dtypes = noted(key) if noted else (common, (up.dtype, up.dtype))
        factor = alpha / rank / scales[key]
        if factor != 1:
            divided = _divided(up, factor, 1, dtypes[0])
            if not noted and not torch.equal((divided.float() * factor).to(up.dtype), up):
                rounded.append(key)
            tensors[f"{key}.{UP}"] = divided
        tensors[f"{key}.{ALPHA}"] = torch.tensor(alpha, dtype=dtypes[1])
        if MAGNITUDE in file.parts(key):
            ones = [1] * (stored[f"{key}.{DOWN}"].ndim - 1)
            tensors[f"{key}.{MAGNITUDE}"] = stored[f"{key}.{MAGNITUDE}"].view(-1, *ones)
    return tensors, tuple(rounded)


class _Note:
    """The alphas of a file that was converted to the layout of diffusers, and its number formats."""

    def __init__(self, content: Mapping[str, object]) -> None:
        """Raises LookupError, TypeError, ValueError or AttributeError for what is no such note."""
        dtypes: list[str] = list(content["dtypes"])  # type: ignore[call-overload]
        self._dtypes = _float_type(dtypes[0]), _float_type(dtypes[1])
        self._alpha = float(content["alpha"])  # type: ignore[arg-type]
        self._others = {key: float(own) for key, own in content["others"].items()}  # type: ignore[attr-defined]

    def __call__(self, key: str) -> tuple[float, tuple[torch.dtype, torch.dtype]]:
        """The alpha of a layer, and the number formats of up factors and alphas."""
        return self._others.get(key, self._alpha), self._dtypes


def _float_type(name: object) -> torch.dtype:
    found = getattr(torch, str(name))
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{name} is no number format")
    return found


def _noted(note: str | None, file: LoRAFile) -> _Note | None:
    """What a file in the layout of diffusers says of its alphas; None if it says nothing that makes sense."""
    if note is None or _OF_PEFT in file.summary.metadata:
        return None
    try:
        found = _Note(json_object({_NOTE: note}, _NOTE))
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    return found if all(found(key)[0] > 0 for key in file.keys) else None
