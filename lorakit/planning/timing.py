"""How long steps take, measured by taking some."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from attrs import frozen

from lorakit.data.batches import Batch
from lorakit.data.planning import Bucket, buckets
from lorakit.engine.assembly import assemble_with, launched_processes
from lorakit.engine.base_model import build_model
from lorakit.engine.caching import Encoded
from lorakit.engine.modes import in_mode
from lorakit.engine.preparation import PreparedRun
from lorakit.engine.processes import Processes
from lorakit.engine.replaying import Learn
from lorakit.engine.run import Run
from lorakit.engine.schedule import Schedule
from lorakit.engine.trainer import learn_from
from lorakit.planning.examples import BatchShape, Texts, make_batch

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
    """The most bytes that were in use on the device; None where it does not say."""


def measure(prepared: PreparedRun, texts: Texts) -> Timing:
    """Read the model and take some steps with micro-batches of each shape that the run has."""
    training = prepared.config.training
    processes = launched_processes(training)
    run = _assembled(prepared, processes)
    found = buckets(prepared.datasets)
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(processes.device)
    # The largest first: what fits once it did fits again.
    shapes = sorted({BatchShape.of(bucket) for bucket in found}, key=lambda shape: -shape.pixels)
    with in_mode(run, partial(learn_from, run)) as learn:
        seconds = {
            shape: min(_steps(run, learn, make_batch(shape, texts, run.model).to(processes.device))) for shape in shapes
        }
    peak = torch.cuda.max_memory_allocated(processes.device) if processes.device.type == "cuda" else None
    return Timing(processes.device.type, seconds, _whole(seconds, found, run.schedule), peak)


def _assembled(prepared: PreparedRun, processes: Processes) -> Run:
    """The run with nothing encoded; what encoders it needs for its steps are read when they are used."""
    model = build_model(prepared.config, processes.device)
    schedule = Schedule(prepared.datasets, prepared.config.training, processes)
    return assemble_with(prepared, model, schedule, Encoded({}, {}, None), processes, time.time())


def _steps(run: Run, learn: Learn, batch: Batch) -> Iterator[float]:
    """Seconds of each step with one micro-batch, but for the first."""
    for number in range(_STEPS):
        started = time.perf_counter()
        learn(batch)
        run.update()
        run.processes.finish()
        if number:
            yield time.perf_counter() - started


def _whole(seconds: Mapping[BatchShape, float], found: Sequence[Bucket], schedule: Schedule) -> float:
    """Seconds of a run; short micro-batches count as whole ones."""
    epoch = sum(bucket.micro_batches * seconds[BatchShape.of(bucket)] for bucket in found)
    return epoch * schedule.total_steps / schedule.steps_per_epoch
