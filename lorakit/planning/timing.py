"""How long steps take, measured by taking some."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from attrs import frozen

from lorakit.data.batch_sampler import Bucket, buckets
from lorakit.data.loader import Batch
from lorakit.data.prompts import CachedPrompts
from lorakit.models.conditioning import collate
from lorakit.planning.dummy_batches import BatchShape, Texts, make_batch
from lorakit.training.encode import Encoded
from lorakit.training.prepare import PreparedRun
from lorakit.training.run import Run
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.schedule import Schedule
from lorakit.training.setup import build_model, build_run_from, init_distributed
from lorakit.training.step.autotune import compile_step
from lorakit.training.step.cuda_graphs import ForwardBackward
from lorakit.training.step.numerics import tf32_allowed

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
    processes = init_distributed(training)
    run = _assembled(prepared, processes)
    found = buckets(prepared.datasets)
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(processes.device)
    # The largest first: what fits once it did fits again.
    shapes = sorted({BatchShape.of(bucket) for bucket in found}, key=lambda shape: -shape.pixels)
    with tf32_allowed(training.tf32, processes.device):
        compute = compile_step(run)
        seconds = {
            shape: min(_steps(run, compute, make_batch(shape, texts, run.model).to(processes.device)))
            for shape in shapes
        }
    peak = torch.cuda.max_memory_allocated(processes.device) if processes.device.type == "cuda" else None
    return Timing(processes.device.type, seconds, _whole(seconds, found, run.schedule), peak)


def _assembled(prepared: PreparedRun, processes: Distributed) -> Run:
    """The run with nothing encoded; what encoders it needs for its steps are read when they are used."""
    model = build_model(prepared.config, processes.device)
    encoded = Encoded({}, CachedPrompts(prepared.cache, {}, partial(collate, model)), None)
    return build_run_from(prepared, model, encoded, processes, time.time())


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


def _whole(seconds: Mapping[BatchShape, float], found: Sequence[Bucket], schedule: Schedule) -> float:
    """Seconds of a run; short micro-batches count as whole ones."""
    epoch = sum(bucket.micro_batches * seconds[BatchShape.of(bucket)] for bucket in found)
    return epoch * schedule.total_steps / schedule.steps_per_epoch
