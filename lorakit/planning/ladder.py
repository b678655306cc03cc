"""The ladder of memory: settings of `[training]`, and what training needs with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import evolve, frozen

from lorakit.config.savings import rungs, saving_keys, to_toml
from lorakit.config.sections import TrainingSection
from lorakit.data.batches import Batch
from lorakit.engine.preparation import PreparedRun
from lorakit.planning.memory import EncodingMemory, TrainingMemory, imaginable, training_memory

RESERVE = 2**29
"""Bytes to leave free: for what PyTorch and the device's driver take, and the gaps between tensors."""


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
        return saving_keys(self.training)

    def fits(self, memory: int) -> bool:
        """Whether training runs in so many bytes of memory, as far as that can be foreseen."""
        return self.memory.peak + RESERVE <= memory

    def __str__(self) -> str:
        return ", ".join(to_toml(self.keys)) or "none of them"


def climb(prepared: PreparedRun, batch: Batch, encoding: EncodingMemory) -> Iterator[Rung]:
    """The rungs from the fastest to the smallest; the config's own settings come first if they are none of them."""
    own, ladder = prepared.config.training, list(rungs(prepared.config.training, prepared.parts_in_memory))
    for training in ladder if own in ladder else [own, *ladder]:
        config = evolve(prepared.config, training=training)
        memory = training_memory(imaginable(evolve(prepared, config=config)), batch, encoding)
        yield Rung(training, memory, is_config=training == own)


def first_that_fits(rungs: Sequence[Rung], memory: int) -> Rung | None:
    """The fastest rung for so many bytes of memory; None if there is none."""
    return next((rung for rung in rungs if rung.fits(memory)), None)
