"""Presets: settings of `[training]` that save memory, from the fastest to the smallest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import evolve

from lorakit.config.train_config import QUANTIZATION_KEYS, UNIFIED_MEMORY_DEVICES, TrainingSection
from lorakit.utils.plain import toml_value

SAVING_KEYS = ("gradient_checkpointing", *QUANTIZATION_KEYS, "stream_base")
"""The keys that presets set."""

_BITS = {"fp8_base": 8, "int8_base": 8, "nf4_base": 4}

_PRESETS: tuple[tuple[bool, str | None, bool], ...] = (
    (False, None, False),
    (True, None, False),
    (True, "int8_base", False),
    (True, "nf4_base", False),
    (True, None, True),
    (True, "nf4_base", True),
)
"""Whether activations are checkpointed, how the base model is quantized, and whether it is offloaded.

Exact settings come first, then nearly exact ones; last those that wait for copies, in the same order."""


def memory_presets(training: TrainingSection, parts: Sequence[str]) -> Iterator[TrainingSection]:
    """The settings of each preset; `parts` of the base model are in memory while the network trains."""
    for checkpointing, quantization, is_offloaded in _PRESETS:
        if is_offloaded and (
            training.compile or training.cuda_graphs is True or training.device in UNIFIED_MEMORY_DEVICES
        ):
            return
        quantized: dict[str, Any] = {key: tuple(parts) if key == quantization else () for key in QUANTIZATION_KEYS}
        offloaded = tuple(parts) if is_offloaded else ()
        yield evolve(training, gradient_checkpointing=checkpointing, stream_base=offloaded, **quantized)


def next_preset(training: TrainingSection, parts: Sequence[str]) -> TrainingSection | None:
    """The first preset that saves more than the settings in one way and less in none; None if there is none."""
    current = _saved(training, parts)
    for preset in memory_presets(training, parts):
        saved = _saved(preset, parts)
        if saved != current and all(more >= less for more, less in zip(saved, current, strict=True)):
            return preset
    return None


def saving_keys(training: TrainingSection) -> dict[str, object]:
    """The keys that save memory, with their values."""
    return {name: value for name in SAVING_KEYS if (value := getattr(training, name))}


def preset_diff(preset: TrainingSection, current: TrainingSection) -> dict[str, object]:
    """The keys to write for a preset, and those of the current settings to switch off."""
    keys, listed = saving_keys(preset), (*QUANTIZATION_KEYS, "stream_base")
    removed: dict[str, object] = {key: () for key in listed if getattr(current, key) and key not in keys}
    if current.gradient_checkpointing and not preset.gradient_checkpointing:
        return {"gradient_checkpointing": False, **keys, **removed}
    return {**keys, **removed}


def to_toml(keys: Mapping[str, object]) -> list[str]:
    """A line of TOML for each key."""
    return [f"{key} = {toml_value(value)}" for key, value in keys.items()]


def _saved(training: TrainingSection, parts: Sequence[str]) -> list[float]:
    """How much settings save in each way: the share that is checkpointed, and each part's bits and offloading."""
    bits = {part: _BITS[key] for key in QUANTIZATION_KEYS for part in getattr(training, key)}
    by_part = [number for part in parts for number in (-bits.get(part, 32), part in training.stream_base)]
    return [float(training.gradient_checkpointing), *by_part]
