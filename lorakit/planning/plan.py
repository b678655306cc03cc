"""What is known of a run before it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from attrs import frozen

from lorakit.planning.dummy_batches import BatchShape, Texts, largest_shape, make_batch
from lorakit.planning.estimate import (
    EncodingMemory,
    MemoryPreset,
    as_cpu_run,
    caption_encoding_memory,
    estimate_presets,
    image_encoding_memory,
)
from lorakit.planning.timing import Timing, measure
from lorakit.training.prepare import PreparedRun
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.out_of_memory import half_precision
from lorakit.training.schedule import Schedule
from lorakit.training.setup import build_model

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class Plan:
    """What a run will do and take."""

    prepared: PreparedRun
    schedule: Schedule
    largest: BatchShape
    """The shape of micro-batches that memory was estimated for."""
    images: EncodingMemory
    """What encoding images needs."""
    captions: EncodingMemory | None
    """What encoding captions needs; None where that is part of each step."""
    presets: Sequence[MemoryPreset]
    """Memory with each preset, and with the config's settings."""
    timing: Timing | None
    """Measured times; None if nothing was measured."""

    @property
    def current(self) -> MemoryPreset:
        """The settings of the config, with their memory."""
        return next(preset for preset in self.presets if preset.is_config)

    @property
    def could_be_half(self) -> bool:
        """Whether half precision would need less, as the config does without."""
        return self.prepared.config.training.mixed_precision == "no"

    @property
    def half_precision(self) -> str:
        """The half precision that suits the device best."""
        return half_precision(self.prepared.config.training.device)


def schedule_of(prepared: PreparedRun) -> Schedule:
    """The steps of a run on one device."""
    return Schedule(prepared.datasets, prepared.config.training, Distributed(torch.device("cpu")))


def make_plan(prepared: PreparedRun, *, measured: bool = False) -> Plan:
    """Plan a run; weights are read only if steps are to be measured.

    Raises the errors that training would start with, as far as they show without weights.
    """
    cpu_run = as_cpu_run(prepared)
    log.info("estimating memory")
    model, texts, largest = (
        build_model(cpu_run.config, torch.device("cpu")),
        Texts.of(cpu_run),
        largest_shape(prepared),
    )
    images = image_encoding_memory(cpu_run)
    captions = None if prepared.encodes_captions else caption_encoding_memory(cpu_run)
    presets = tuple(estimate_presets(prepared, make_batch(largest, texts, model), images))
    if measured:
        log.info("measuring steps")
    return Plan(
        prepared=prepared,
        schedule=schedule_of(prepared),
        largest=largest,
        images=images,
        captions=captions,
        presets=presets,
        timing=measure(prepared, texts) if measured else None,
    )
