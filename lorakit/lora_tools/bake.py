"""Baking LoRA files into a base model: a new file or folder in which the layers that they adapt are changed.

W ← W + weight·ΔW in float32, rounded once to the file's number format; of a DoRA, `weight` of the way from W to
magnitude·(W + ΔW)/‖W + ΔW‖. All other tensors are copied byte by byte. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen
from torch import Tensor

from lorakit.checkpoints import Shapes, summarize
from lorakit.checkpoints.kinds import adapter_kind
from lorakit.checkpoints.lora_names import ALPHA, MAGNITUDE
from lorakit.errors import AdapterError, ModelError, OutputError
from lorakit.lora_tools.adapters import LORA_PARTS, AnyPath, LoRAFile, open_lora
from lorakit.lora_tools.base_layers import BaseLayer, LayeredModel, open_model
from lorakit.lora_tools.merge import WeightedFile, weighted_files
from lorakit.lora_tools.output import new_file, new_folder, staged
from lorakit.lora_tools.stream import copy_folder, layout_of, write_stream
from lorakit.models.weights.checkpoint import CheckpointPart
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
    """A model that was written and read back."""

    path: Path
    """The file or folder."""
    changed: int
    """Layers that were changed."""
    copied: int
    """Tensors that were copied into the same files."""


@frozen
class _ChangedFile:
    """A file of a part of the base model that is written with other weights."""

    source: Path
    name: str
    """Of the new file, relative to what is written."""
    layers: Mapping[str, Sequence[tuple[BaseLayer, slice]]]
    """The changed layers, each with those of its rows that are there, by the name of the tensor in the file."""
    shapes: Shapes
    """Shape of each tensor in it."""


def bake(base: AnyPath, files: Sequence[WeightedFile], output: AnyPath) -> Baked:
    """Write a base model with LoRA files baked in, each times its weight, in this order.

    If `base` is a single file, the output is a safetensors file with the same tensors and number formats; if it is a
    diffusers folder, the output is one. Takes LoRA, DoRA, LoHa and LoKr. Raises `AdapterError` unless all of the files'
    adapters are for layers of the model.
    """
    weighted, is_folder = weighted_files(files), os.path.isdir(base)  # noqa: PTH112 - raises nothing
    target = new_folder(output) if is_folder else new_file(output)
    model = open_model(base)
    opened = [(open_lora(path, model.targets), weight) for path, weight in weighted]
    for file, _ in opened:
        _check_fit(file, model)
    layers = [layer for layer in model.layers if any(file.parts(layer.target.key) for file, _ in opened)]
    changed = _changed_files(layers, model.summary.path if is_folder else None)
    with staged(target) as written, as_output_error(target):
        if is_folder:
            copy_folder(model.summary.path, written, [layer.part.file for layer in layers])
        for part in changed:
            if not _write(part, written / part.name if is_folder else written, opened):
                raise OutputError(f"{target} was not read back as it was written. The disk may be failing.")
    copied = sum(len(part.shapes) - len(part.layers) for part in changed)
    return Baked(target, len(layers), copied)


def _changed_files(layers: Sequence[BaseLayer], folder: Path | None) -> list[_ChangedFile]:
    """The files of the parts that layers are in; new names are relative to the folder of the model, if it is one."""
    found = []
    for part in {layer.part.files: layer.part for layer in layers}.values():
        tensors = {source: summarize(source).tensors for source in part.files}
        whole = {name: shape for own in tensors.values() for name, shape in own.items()}
        places = [(name, own) for own in layers if own.part.files == part.files for name in stored_names(own.place)]
        for source, shapes in tensors.items():
            stored = defaultdict(list)
            for stored_name, layer in places:
                if stored_name in shapes:
                    stored[stored_name].append((layer, _rows_of(stored_name, layer.place, whole)))
            name = _new_name(source, part).relative_to(folder).as_posix() if folder else source.name
            found.append(_ChangedFile(source, name, stored, shapes))
    return found


def _new_name(source: Path, part: CheckpointPart) -> Path:
    """The path of a file of a folder with the ending of safetensors."""
    if source.suffix == ".safetensors":
        return source
    if part.shards:
        raise ModelError(f"{part} is in several files that are not .safetensors; save the model as .safetensors first")
    return source.with_name(part.format.files[0])


def _write(file: _ChangedFile, path: Path, files: Sequence[tuple[LoRAFile, float]]) -> bool:
    """Write a file of the model with its layers changed; whether it is read back as it was written."""
    summary, read = summarize(file.source), open_tensors(file.source)

    def tensor(name: str) -> Tensor:
        whole = read(name)
        for layer, rows in file.layers.get(name, ()):
            whole = _with_layer(whole, layer, rows, files)
        return whole

    merged = json.dumps({lora.path.name: weight for lora, weight in files})
    kept = {key: text for key, text in summary.metadata.items() if not key.startswith(_NO_LONGER_TRUE)}
    # Transformers reads no file that does not say so.
    origin = {} if summary.kind == "safetensors" else {"format": "pt"}
    metadata = {**origin, **kept, "modelspec.merged_from": merged}
    return write_stream(path, layout_of(file.source, summary.kind), metadata, tensor)


def _rows_of(name: str, place: TensorRef, shapes: Shapes) -> slice:
    """The rows of a layer at a place that a stored tensor has."""
    if not isinstance(place, JoinedTensors):
        return slice(None)
    index = place.names.index(name)
    start = sum(shape_at(part, shapes)[0] for part in place.parts[:index])
    return slice(start, start + shape_at(place.parts[index], shapes)[0])


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
