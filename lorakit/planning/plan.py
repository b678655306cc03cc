"""What is known of a run before it starts: steps, memory, and times if they are measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from attrs import evolve, frozen

from lorakit.config.train_config import TrainingSection
from lorakit.data.batch_sampler import buckets
from lorakit.data.loader import Batch, CachedPrompts
from lorakit.models.conditioning import collate
from lorakit.planning.dummy_batches import CPU, BatchShape, Texts, largest_shape, make_batch
from lorakit.planning.estimate import (
    EncodingMemory,
    MemoryPreset,
    as_cpu_run,
    caption_encoding_memory,
    estimate_presets,
    image_encoding_memory,
)
from lorakit.training.encode import Encoded
from lorakit.training.prepare import PreparedRun
from lorakit.training.run import Run
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.precision import IMAGINED_GPU, Precision, half_precision, precision_of, with_precision
from lorakit.training.schedule import Schedule
from lorakit.training.setup import build_model, build_run_from, init_distributed
from lorakit.training.step.autotune import compile_step
from lorakit.training.step.cuda_graphs import ForwardBackward
from lorakit.training.step.numerics import numerics_of

log = logging.getLogger(__name__)

_STEPS = 3
"""Steps that are taken for each shape, of which the first does not count: it makes what the others find."""


@frozen
class Timing:
    """What was measured."""

    device: str
    """Where steps were taken."""
    seconds: Mapping[BatchShape, float]
    """Of a step, by the shape of its micro-batch."""
    run: float
    """Seconds that all steps of the run will take."""
    peak: int | None
    """The most bytes that PyTorch reserved on the device; None where it does not say."""


@frozen(kw_only=True)
class Plan:
    """What a run will do and take."""

    prepared: PreparedRun
    schedule: Schedule
    largest: BatchShape
    """The shape of micro-batches that memory was estimated for."""
    images: EncodingMemory
    """What encoding images needs."""
    captions: int | None
    """Bytes that encoding captions needs; None where that is part of each step."""
    presets: Sequence[MemoryPreset]
    """Memory with each preset, and with the config's settings."""
    timing: Timing | None
    """Measured times; None if nothing was measured."""
    precision: Precision
    """What `prepared` computes in, and why."""

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
    return Schedule(prepared.datasets, prepared.config.training, Distributed(CPU))


def make_plan(prepared: PreparedRun, *, measured: bool = False, for_gpu: bool = False) -> Plan:
    """Plan a run; weights are read only if steps are to be measured.

    `for_gpu`: the device "auto" is a GPU even where there is none, unless steps are measured. Raises the errors that
    training would start with, as far as they show without weights.
    """
    precision = planned_precision(prepared.config.training, for_gpu and not measured)
    prepared = evolve(prepared, config=with_precision(prepared.config, precision))
    cpu_run = as_cpu_run(prepared)
    log.info("estimating memory")
    model, texts, largest = build_model(cpu_run.config, CPU), Texts.of(cpu_run), largest_shape(prepared)
    images = image_encoding_memory(cpu_run)
    captions = None if prepared.encodes_captions else caption_encoding_memory(cpu_run)
    presets = tuple(estimate_presets(prepared, make_batch(largest, texts, model), images))
    timing = None
    if measured:
        log.info("measuring steps")
        timing = measure(prepared, texts)
    return Plan(
        prepared=prepared,
        schedule=schedule_of(prepared),
        largest=largest,
        images=images,
        captions=captions,
        presets=presets,
        timing=timing,
        precision=precision,
    )


def planned_precision(training: TrainingSection, for_gpu: bool) -> Precision:
    """The precision that a run will have, on a device that need not be there."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = training.device.partition(":")[0]
    if kind == "auto" and not (found is None and for_gpu):
        kind = found.type if found else "cpu"
    is_here = found is not None and found.type == kind
    if training.mixed_precision == "auto" and kind in ("auto", "cuda") and not is_here:
        return IMAGINED_GPU
    return precision_of(training, torch.device("cuda" if kind == "auto" else kind))


def measure(prepared: PreparedRun, texts: Texts) -> Timing:
    """Read the model and take some steps with micro-batches of each shape that the run has."""
    prepared, processes = init_distributed(prepared)
    model = build_model(prepared.config, processes.device)
    # Nothing is encoded; the encoders that steps need are read when they are used.
    encoded = Encoded({}, CachedPrompts(prepared.cache, {}, partial(collate, model)), None)
    run = build_run_from(prepared, model, encoded, processes, time.time())
    found = buckets(prepared.datasets)
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(processes.device)
    # The largest first: what fits once it did fits again.
    shapes = sorted({BatchShape.of(bucket) for bucket in found}, key=lambda shape: -shape.pixels)
    with numerics_of(run):
        compute = compile_step(run)
        seconds = {
            shape: min(_steps(run, compute, make_batch(shape, texts, run.model).to(processes.device)))
            for shape in shapes
        }
    # Reserved memory, not allocated memory: fragmentation must fit into the device, too.
    peak = torch.cuda.max_memory_reserved(processes.device) if processes.device.type == "cuda" else None
    # Short micro-batches count as complete ones.
    epoch = sum(bucket.micro_batches * seconds[BatchShape.of(bucket)] for bucket in found)
    total = epoch * run.schedule.total_steps / run.schedule.steps_per_epoch
    return Timing(processes.device.type, seconds, total, peak)


def _steps(run: Run, compute: ForwardBackward, batch: Batch) -> Iterator[float]:
    """Seconds of each step with one micro-batch, but for the first."""
    for number in range(_STEPS):
        started = time.perf_counter()
        step = next(run.schedule.steps_from(0, iter(())))
        compute(batch)
        run.update(step)
        run.processes.synchronize()
        if number:
            yield time.perf_counter() - started
