"""Baking LoRA files into a base model: a new checkpoint in which the layers that they adapt are changed.

W ← W + weight·ΔW in float32, rounded once to the file's number format; of a DoRA, `weight` of the way from W to
magnitude·(W + ΔW)/‖W + ΔW‖. All other tensors are copied byte by byte. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen
from torch import Tensor

from lorakit.checkpoints import Shapes
from lorakit.checkpoints.kinds import adapter_kind
from lorakit.checkpoints.lora_names import ALPHA, MAGNITUDE
from lorakit.errors import AdapterError, ModelError, OutputError
from lorakit.lora_tools.adapters import LORA_PARTS, AnyPath, LoRAFile, open_lora
from lorakit.lora_tools.base_layers import BaseLayer, LayeredModel, open_model
from lorakit.lora_tools.merge import WeightedFile, weighted_files
from lorakit.lora_tools.output import new_file, staged
from lorakit.lora_tools.stream import layout_of, write_stream
from lorakit.models.weights.folders import (
    JoinedTensors,
    TensorRef,
    TensorSlice,
    TransposedTensor,
    shape_at,
    stored_names,
)
from lorakit.models.weights.load import open_tensors
from lorakit.models.weights.merge_lora import updated
from lorakit.utils.atomic_io import as_output_error
from lorakit.utils.wording import some

_NO_LONGER_TRUE = ("sshs_", "modelspec.hash_sha256")


@frozen
class Baked:
    """A checkpoint that was written and read back."""

    path: Path
    """The file."""
    changed: int
    """Layers that were changed."""
    copied: int
    """Tensors that were copied."""


def bake(base: AnyPath, files: Sequence[WeightedFile], output: AnyPath) -> Baked:
    """Write a base model with LoRA files baked in, each times its weight, in this order.

    `base` is a single file; the output is a safetensors file with the same tensors and number formats. Takes LoRA,
    DoRA, LoHa and LoKr. Raises `AdapterError` unless all of the files' adapters are for layers of the model.
    """
    weighted, target = weighted_files(files), new_file(output)
    model = open_model(base)
    if model.summary.kind == "folder":
        raise ModelError(f"{base} is a folder; bake takes a model in one file, .safetensors or .ckpt")
    opened = [(open_lora(path, model.targets), weight) for path, weight in weighted]
    for file, _ in opened:
        _check_fit(file, model)
    stored: dict[str, list[BaseLayer]] = {}
    changed = 0
    for layer in model.layers:
        if any(file.parts(layer.target.key) for file, _ in opened):
            changed += 1
            for name in stored_names(layer.place):
                stored.setdefault(name, []).append(layer)
    layout, read = layout_of(model.summary.path, model.summary.kind), open_tensors(model.summary.path)

    def tensor(name: str) -> Tensor:
        whole = read(name)
        for layer in stored.get(name, ()):
            rows = _rows_of(name, layer.place, model.summary.tensors)
            whole = _with_layer(whole, layer, rows, opened)
        return whole

    merged = json.dumps({file.path.name: weight for file, weight in opened})
    metadata = {key: text for key, text in model.summary.metadata.items() if not key.startswith(_NO_LONGER_TRUE)}
    with staged(target) as written, as_output_error(target):
        if not write_stream(written, layout, {**metadata, "modelspec.merged_from": merged}, tensor):
            raise OutputError(f"{target} was not read back as it was written. The disk may be failing.")
    return Baked(target, changed, len(layout.shapes) - len(stored))


def _rows_of(name: str, place: TensorRef, tensors: Shapes) -> slice:
    """The rows of a layer that a stored tensor has."""
    if not isinstance(place, JoinedTensors):
        return slice(None)
    index = place.names.index(name)
    start = sum(shape_at(part, tensors)[0] for part in place.parts[:index])
    return slice(start, start + shape_at(place.parts[index], tensors)[0])


def _with_layer(whole: Tensor, layer: BaseLayer, rows: slice, files: Sequence[tuple[LoRAFile, float]]) -> Tensor:
    """The stored tensor, which has these rows of a layer, with its updates.

    The layer may be all of the tensor, some of its rows, its transpose, or larger.
    """
    key, place = layer.target.key, layer.place
    weight = layer.read().float()
    for file, multiplier in files:
        if file.parts(key):
            update, _ = file.update(key)
            magnitude = file.tensor(f"{key}.{MAGNITUDE}").float() if MAGNITUDE in file.parts(key) else None
            weight = updated(weight, update.view_as(weight), magnitude, multiplier)
    changed = weight[rows].to(whole.dtype)
    if not changed.isfinite().all():
        raise AdapterError(f"{key} would have numbers that {whole.dtype} cannot hold; give smaller weights.")
    if isinstance(place, TensorSlice):
        copy = whole.clone()
        copy[place.start : place.stop] = changed.reshape(place.stop - place.start, *whole.shape[1:])
        return copy
    return changed.T if isinstance(place, TransposedTensor) else changed.reshape(whole.shape)


def _check_fit(file: LoRAFile, model: LayeredModel) -> None:
    """An `AdapterError` unless all adapters of a file are for layers of the model, and of their size."""
    layers: Mapping[str, BaseLayer] = {layer.target.key: layer for layer in model.layers}
    reasons = [f"{key} is no layer of it" for key in file.keys if key not in layers]
    for key in file.keys if not reasons else ():
        reason = _misfit(file, key, layers[key].shape)
        reasons += [reason] if reason else []
    if reasons:
        raise AdapterError(
            f"{file.path} does not fit {model.path}: {some(reasons, more=' and {} more', separator='; ')}. It is"
            f" {adapter_kind(file.summary).description}, and the model is {model.family.title}."
        )


def _misfit(file: LoRAFile, key: str, shape: tuple[int, ...]) -> str:
    outputs, inputs = shape[0], 1
    for side in shape[1:]:
        inputs *= side
    if file.parts(key) - {ALPHA, MAGNITUDE} <= LORA_PARTS:
        adapter = file.adapter(key)
        found = (len(adapter.up), adapter.down.shape[1])
    else:
        found = tuple(file.update(key)[0].shape)  # type: ignore[assignment]
        magnitude = file.names.shapes.get(f"{key}.{MAGNITUDE}", (outputs,))
        if magnitude[0] != outputs:
            return f"{key} has magnitudes for {list(magnitude)}, and the layer has {outputs} outputs"
    return "" if found == (outputs, inputs) else f"{key} is for weights of {list(found)}, the layer's are {list(shape)}"
