"""Merging LoRA files: the sum of their updates, each times a weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorakit.errors import AdapterError
from lorakit.lora_tools.adapters import Adapter, AnyPath, LoRAFile, open_lora, refuse_dora, require_one_family
from lorakit.lora_tools.low_rank import ChooseRank, concatenated, decompose_product, fixed_rank
from lorakit.lora_tools.metadata import kept_metadata, network_metadata
from lorakit.lora_tools.output import LayerError, Written, lora_tensors_of, new_file, precision_of, write_lora
from lorakit.networks.adapter_file import Precision
from lorakit.networks.lora_layouts import in_dotted_layout

WeightedFile = AnyPath | tuple[AnyPath, float]
"""A LoRA file, and what its update is multiplied by; 1 if that is left out."""


def merge(
    files: Sequence[WeightedFile], output: AnyPath, *, rank: int | None = None, precision: Precision | None = None
) -> Written:
    """Write the sum of the updates of LoRA files, each times its weight, as one LoRA.

    Without `rank`, its rank is the sum of the ranks, and the update is exact; with it, it is the best approximation of
    that rank. `precision` is that of the files when absent. Raises `AdapterError` for files that cannot be merged.
    """
    weighted = weighted_files(files)
    target = new_file(output)
    choose = None if rank is None else fixed_rank(rank)
    opened = [(open_lora(path), weight) for path, weight in weighted]
    loras = [file for file, _ in opened]
    require_one_family(loras)
    refuse_dora(loras, "a sum")
    for file in loras:
        file.require_lora()
    merged, errors = sum_of(opened, choose)
    merged_from = {file.path.name: weight for file, weight in opened}
    return save(loras, merged, target, precision, errors, {"modelspec.merged_from": json.dumps(merged_from)})


def weighted_files(files: Sequence[WeightedFile]) -> list[tuple[Path, float]]:
    """Paths and weights. Raises `AdapterError` if there are none, or weights that are no numbers."""
    pairs = [file if isinstance(file, tuple) else (file, 1.0) for file in files]
    if not pairs:
        raise AdapterError("There are no files to merge; give LoRA files.")
    for path, weight in pairs:
        if not math.isfinite(weight):
            raise AdapterError(f"The weight of {path} is {weight}; give a number.")
    return [(Path(path), float(weight)) for path, weight in pairs]


def sum_of(
    files: Sequence[tuple[LoRAFile, float]], choose: ChooseRank | None
) -> tuple[dict[str, Adapter], tuple[LayerError, ...]]:
    """The weighted sum of the updates of each layer; `choose` gives the rank of each, None for the exact sum."""
    merged: dict[str, Adapter] = {}
    errors = []
    for key in dict.fromkeys(key for file, _ in files for key in file.keys):
        own = [(file, file.adapter(key), weight) for file, weight in files if file.parts(key)]
        inputs = own[0][1].inputs
        for file, adapter, _ in own:
            if adapter.down.shape[1:] != own[0][1].down.shape[1:] or len(adapter.up) != len(own[0][1].up):
                raise AdapterError(
                    f"{own[0][0].path} and {file.path} have adapters of different sizes for {key}; they are for "
                    "different kinds of base models."
                )
            # A 1×1 convolution and a linear layer stand for each other; only convolutions take both.
            inputs = max(inputs, adapter.inputs, key=len)
        up, down = concatenated((adapter.up, adapter.down, weight) for _, adapter, weight in own)
        if choose is not None:
            found = decompose_product(up, down)
            rank = choose(found.values)
            errors.append(LayerError(key, found.tail(rank) ** 2, found.tail(0) ** 2))
            up, down = found.factors(rank)
        merged[key] = Adapter(up, down, inputs)
    return merged, tuple(errors)


def save(
    sources: Sequence[LoRAFile],
    adapters: Mapping[str, Adapter],
    output: Path,
    precision: Precision | None,
    errors: tuple[LayerError, ...] = (),
    entries: Mapping[str, str] = {},
) -> Written:
    """Write adapters that were made from files, with the metadata of these and some entries more.

    For other models than Stable Diffusion, it is in the layout of the first file.
    """
    tensors, alpha = lora_tensors_of(adapters, precision_of(list(sources), precision))
    metadata = network_metadata({**kept_metadata(sources, output), **entries}, adapters, alpha)
    if sources[0].paths:
        paths = {key: path for file in reversed(sources) for key, path in file.paths.items()}
        tensors = in_dotted_layout(tensors, paths)
    write_lora(output, tensors, metadata)
    return Written(output, {key: adapter.rank for key, adapter in adapters.items()}, errors)
