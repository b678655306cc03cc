"""Averaging several saves of a run: one LoRA of the same ranks, closest to the mean of their updates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from lorakit.checkpoints.lora_files import bare_shape
from lorakit.checkpoints.lora_names import ALPHA
from lorakit.errors import AdapterError
from lorakit.lora_tools.adapters import Adapter, AnyPath, LoRAFile, open_lora, refuse_dora, require_one_family
from lorakit.lora_tools.low_rank import concatenated, decompose_product, fixed_rank
from lorakit.lora_tools.merge import save
from lorakit.lora_tools.output import LayerError, Written, new_file
from lorakit.networks.adapter_file import Precision


def average(
    files: Sequence[AnyPath], output: AnyPath, *, ema: float | None = None, precision: Precision | None = None
) -> Written:
    """Write the mean of the updates of several saves of a run, at their ranks.

    With `ema`, the mean is a moving one over the saves by their steps: each new save gets `1 - ema`, all before it
    `ema`. The mean of updates has the sum of the ranks; what is written is the best approximation, and the result
    says the error. Raises `AdapterError` for files that are no saves of one run.
    """
    target = new_file(output)
    if len(files) < 2:
        raise AdapterError("An average takes two files or more.")
    opened = [open_lora(file) for file in files]
    require_one_family(opened)
    refuse_dora(opened, "an average")
    _require_one_run(opened)
    if ema is not None:
        if not 0 < ema < 1:
            raise AdapterError(f"ema must be between 0 and 1, not {ema:g}.")
        opened.sort(key=_step)
    weights = mean_weights(len(opened), ema)
    averaged: dict[str, Adapter] = {}
    errors = []
    for key in opened[0].keys:
        own = [file.adapter(key) for file in opened]
        terms = [(adapter.up, adapter.down, weight) for adapter, weight in zip(own, weights, strict=True)]
        found = decompose_product(*concatenated(terms))
        rank = fixed_rank(own[0].rank)(found.values)
        averaged[key] = Adapter(*found.factors(rank), max((adapter.inputs for adapter in own), key=len))
        errors.append(LayerError(key, found.tail(rank) ** 2, found.tail(0) ** 2))
    merged_from = json.dumps({file.path.name: weight for file, weight in zip(opened, weights, strict=True)})
    return save(opened, averaged, target, precision, tuple(errors), {"modelspec.merged_from": merged_from})


def mean_weights(count: int, ema: float | None) -> list[float]:
    """What each of several saves counts for, the oldest first; the sum is 1."""
    if ema is None:
        return [1 / count] * count
    later = [(1 - ema) * ema ** (count - 1 - index) for index in range(1, count)]
    return [ema ** (count - 1), *later]


def _require_one_run(files: Sequence[LoRAFile]) -> None:
    first = _shapes(files[0])
    for file in files[1:]:
        other = _shapes(file)
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            raise AdapterError(
                f"{files[0].path} and {file.path} are not saves of one run: {differing[0]} differs."
                " `lorakit lora merge` takes files of different runs."
            )


def _shapes(file: LoRAFile) -> Mapping[str, tuple[int, ...]]:
    """The shapes of its factors; a 1×1 convolution and a linear layer are alike."""
    return {name: bare_shape(shape) for name, shape in file.names.shapes.items() if not name.endswith(f".{ALPHA}")}


def _step(file: LoRAFile) -> int:
    text = file.summary.metadata.get("ss_steps", "")
    if not text.isdecimal():
        raise AdapterError(
            f"{file.path} does not say its step in ss_steps, by which a moving average orders the saves."
        )
    return int(text)
