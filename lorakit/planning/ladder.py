"""The ladder of memory: settings of `[training]` that need less and less of it, and what a step costs more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tomlkit
from attrs import evolve, frozen

from lorakit.config.sections import BASE_KEYS, TrainingSection
from lorakit.data.batches import Batch
from lorakit.engine.preparation import PreparedRun
from lorakit.planning.memory import EncodingMemory, TrainingMemory, training_memory

RESERVE = 2**29
"""Bytes to leave free: for what PyTorch and the device's driver take, and the gaps between tensors."""

_SAVINGS: tuple[tuple[bool | float, str | None], ...] = (
    (False, None), (0.5, None), (True, None), (False, "int8_base"), (True, "int8_base"), (False, "nf4_base"),
    (True, "nf4_base"),
)  # fmt: skip
"""Gradient checkpointing and form of the frozen weights, rung by rung: first what is exact, then what is nearly so."""


@frozen
class Rung:
    """Settings, and what training needs with them."""

    training: TrainingSection
    """All of `[training]`."""
    memory: TrainingMemory
    is_config: bool
    """Whether these are the settings of the config."""

    @property
    def keys(self) -> dict[str, object]:
        """The keys that save memory, with their values."""
        names = ("gradient_checkpointing", *BASE_KEYS)
        return {name: value for name in names if (value := getattr(self.training, name))}

    def fits(self, memory: int) -> bool:
        """Whether training runs in so many bytes of memory, as far as that can be foreseen."""
        return self.memory.peak + RESERVE <= memory

    def __str__(self) -> str:
        return ", ".join(to_toml(self.keys)) or "none of them"


def to_toml(keys: Mapping[str, object]) -> list[str]:
    """A line of TOML for each key."""
    values: dict[str, Any] = {key: list(own) if isinstance(own, tuple) else own for key, own in keys.items()}
    return [f"{key} = {tomlkit.item(value).as_string()}" for key, value in values.items()]


def climb(prepared: PreparedRun, batch: Batch, encoding: EncodingMemory) -> Iterator[Rung]:
    """The rungs from the fastest to the smallest; the config's own settings come first if they are none of them."""
    own, rungs = prepared.config.training, list(_rungs(prepared))
    is_among_them = any(rung == own for rung in rungs)
    for training in rungs if is_among_them else [own, *rungs]:
        config = evolve(prepared.config, training=training)
        memory = training_memory(evolve(prepared, config=config), batch, encoding)
        yield Rung(training, memory, is_config=training == own)


def first_that_fits(rungs: Sequence[Rung], memory: int) -> Rung | None:
    """The fastest rung for so many bytes of memory; None if there is none."""
    return next((rung for rung in rungs if rung.fits(memory)), None)


def changes(rung: Rung, own: TrainingSection) -> dict[str, object]:
    """The keys to write in place of the config's own: those of the rung, and those that it does without."""
    gone: dict[str, object] = {key: () for key in BASE_KEYS if getattr(own, key) and key not in rung.keys}
    if own.gradient_checkpointing and not rung.training.gradient_checkpointing:
        return {"gradient_checkpointing": False, **rung.keys, **gone}
    return {**rung.keys, **gone}


def _rungs(prepared: PreparedRun) -> Iterator[TrainingSection]:
    """The settings of each rung; forms are for the parts that are in memory while the network trains."""
    parts = tuple(part for part in prepared.config.model.parts if part != "text_encoder" or prepared.encodes_captions)
    for recomputed, key in _SAVINGS:
        forms: dict[str, Any] = {name: parts if name == key else () for name in BASE_KEYS}
        yield evolve(prepared.config.training, gradient_checkpointing=recomputed, **forms)
