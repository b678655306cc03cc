"""Settings of `[training]` that save memory, from the fastest to the smallest: the rungs of a ladder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tomlkit
from attrs import evolve, frozen

from lorakit.config.train_config import QUANTIZATION_KEYS, UNIFIED_MEMORY_DEVICES, TrainingSection

SAVING_KEYS = ("gradient_checkpointing", *QUANTIZATION_KEYS, "stream_base")
"""The keys of which rungs are made."""

_BITS = {"fp8_base": 8, "int8_base": 8, "nf4_base": 4}


@frozen
class _Saving:
    """A rung."""

    recomputed: bool | float = False
    form: str | None = None
    streamed: bool = False


_LADDER = (
    _Saving(), _Saving(0.5), _Saving(True), _Saving(False, "int8_base"), _Saving(True, "int8_base"),
    _Saving(False, "nf4_base"), _Saving(True, "nf4_base"),
    _Saving(True, None, True), _Saving(True, "int8_base", True), _Saving(True, "nf4_base", True),
)  # fmt: skip
"""First what is exact, then what is nearly so; last what waits for copies, in the same order."""


def memory_presets(training: TrainingSection, parts: Sequence[str]) -> Iterator[TrainingSection]:
    """The settings of each rung; `parts` of the base model are in memory while the network trains."""
    for rung in _LADDER:
        if rung.streamed and (training.compile or training.cuda_graphs or training.device in UNIFIED_MEMORY_DEVICES):
            return
        forms: dict[str, Any] = {name: tuple(parts) if name == rung.form else () for name in QUANTIZATION_KEYS}
        streamed = tuple(parts) if rung.streamed else ()
        yield evolve(training, gradient_checkpointing=rung.recomputed, stream_base=streamed, **forms)


def next_preset(training: TrainingSection, parts: Sequence[str]) -> TrainingSection | None:
    """The first rung that saves more than the settings in one way and less in none; None where there is none."""
    own = _saved(training, parts)
    for rung in memory_presets(training, parts):
        saved = _saved(rung, parts)
        if saved != own and all(more >= less for more, less in zip(saved, own, strict=True)):
            return rung
    return None


def saving_keys(training: TrainingSection) -> dict[str, object]:
    """The keys that save memory, with their values."""
    return {name: value for name in SAVING_KEYS if (value := getattr(training, name))}


def preset_diff(wanted: TrainingSection, own: TrainingSection) -> dict[str, object]:
    """The keys to write in place of the config's own: those that are wanted, and those to do without."""
    keys, listed = saving_keys(wanted), (*QUANTIZATION_KEYS, "stream_base")
    gone: dict[str, object] = {key: () for key in listed if getattr(own, key) and key not in keys}
    if own.gradient_checkpointing and not wanted.gradient_checkpointing:
        return {"gradient_checkpointing": False, **keys, **gone}
    return {**keys, **gone}


def to_toml(keys: Mapping[str, object]) -> list[str]:
    """A line of TOML for each key."""
    values: dict[str, Any] = {key: list(own) if isinstance(own, tuple) else own for key, own in keys.items()}
    return [f"{key} = {tomlkit.item(value).as_string()}" for key, value in values.items()]


def _saved(training: TrainingSection, parts: Sequence[str]) -> list[float]:
    """How far settings go in each way: the share that is recomputed, and for each part the bits left out, and where."""
    forms = {part: _BITS[key] for key in QUANTIZATION_KEYS for part in getattr(training, key)}
    by_part = [number for part in parts for number in (-forms.get(part, 32), part in training.stream_base)]
    return [float(training.gradient_checkpointing), *by_part]
