"""The ladder of memory: settings of `[training]`, and what training needs with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import evolve, frozen

from lorakit.config.memory_presets import memory_presets, saving_keys, to_toml
from lorakit.config.train_config import TrainingSection
from lorakit.data.loader import Batch
from lorakit.planning.estimate import EncodingMemory, TrainingMemory, as_cpu_run, training_memory
from lorakit.training.prepare import PreparedRun

RESERVE = 2**29
"""Bytes to leave free: for what PyTorch and the device's driver take, and the gaps between tensors."""


@frozen
class MemoryPreset:
    """Settings, and what training needs with them."""

    training: TrainingSection
    """All of `[training]`."""
    memory: TrainingMemory
    is_config: bool
    """Whether these are the settings of the config."""

    @property
    def keys(self) -> dict[str, object]:
        """The keys that save memory, with their values."""
        return saving_keys(self.training)

    def fits(self, memory: int) -> bool:
        """Whether training runs in so many bytes of memory, as far as that can be foreseen."""
        return self.memory.peak + RESERVE <= memory

    def __str__(self) -> str:
        return ", ".join(to_toml(self.keys)) or "none of them"


def estimate_presets(prepared: PreparedRun, batch: Batch, encoding: EncodingMemory) -> Iterator[MemoryPreset]:
    """The rungs from the fastest to the smallest; the config's own settings come first if they are none of them."""
    own, ladder = prepared.config.training, list(memory_presets(prepared.config.training, prepared.parts_in_memory))
    for training in ladder if own in ladder else [own, *ladder]:
        config = evolve(prepared.config, training=training)
        memory = training_memory(as_cpu_run(evolve(prepared, config=config)), batch, encoding)
        yield MemoryPreset(training, memory, is_config=training == own)


def first_that_fits(memory_presets: Sequence[MemoryPreset], memory: int) -> MemoryPreset | None:
    """The fastest rung for so many bytes of memory; None if there is none."""
    return next((rung for rung in memory_presets if rung.fits(memory)), None)
