"""What is told of a run that memory does not suffice for: in so many words where it ends, and what to change."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from attrs import evolve

from lorakit.config.memory_presets import next_preset, preset_diff, to_toml
from lorakit.config.train_config import UNIFIED_MEMORY_DEVICES
from lorakit.errors import OutOfMemory, is_out_of_memory
from lorakit.training.output.fallback import save_with_fallback

if TYPE_CHECKING:
    from lorakit.training.run import Run

log = logging.getLogger(__name__)


@contextmanager
def explain_oom(run: Run) -> Iterator[None]:
    """Turn a lack of memory in a step into an `OutOfMemory` that says what to change; a state is saved where it can be.

    All that counts is whole until the step's update begins.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # so that the state can be written in the memory that they held
        images, width, height = _largest_batch(run)
        batch = f"{images} image{'s' if images > 1 else ''} of {width}x{height}"
        told = f"Out of memory in step {run.step + 1}, with a batch of {batch}. To need less, {memory_hint(run)}."
        raise OutOfMemory(f"{told}{_saved_state(run)}") from error


def memory_hint(run: Run) -> str:
    """What to set so that steps need less memory, the end of a sentence."""
    training = run.config.training
    if run.processes.device.type in UNIFIED_MEMORY_DEVICES:
        training = evolve(training, device="cpu")
    parts = tuple(part.name for part in run.config.model.parts if not part.encoders or callable(run.loader.captions))
    rung, ways = next_preset(training, parts), []
    if training.mixed_precision == "no":
        ways.append(f'set mixed_precision = "{half_precision(run.processes.device.type)}" in [training]')
    if rung is not None:
        keys = {key: value for key, value in preset_diff(rung, training).items() if value != getattr(training, key)}
        ways.append(f"set {' and '.join(to_toml(keys))} in [training]")
    if _largest_batch(run)[0] > 1:
        ways.append("lower data.batch_size")
    ways.append("lower data.resolution")
    return f"{', or '.join(ways)}; `lorakit plan` tells what fits"


def half_precision(device: str) -> Literal["bf16", "fp16"]:
    """The half precision that suits a device, as the config names it: NVIDIA's before Ampere lack bfloat16."""
    is_cuda = (device == "auto" or device.startswith("cuda")) and torch.cuda.is_available()
    is_old = is_cuda and torch.version.hip is None and torch.cuda.get_device_capability()[0] < 8
    return "fp16" if is_old else "bf16"


def _largest_batch(run: Run) -> tuple[int, int, int]:
    """Images of the largest of this process's micro-batches in the step to come, or the first one, and their sides."""
    step = next(run.schedule.steps_from(run.step), None) or next(run.schedule.steps_from(0))

    def size(number: int) -> tuple[int, int, int]:
        items = step.shares[number].items
        example = run.loader.datasets[items[0].dataset].examples[items[0].example]
        return len(items), *example.placement.bucket

    return max(map(size, range(len(step.shares))), key=lambda own: own[0] * own[1] * own[2])


def _saved_state(run: Run) -> str:
    """A sentence about the state that was saved; empty where nothing is lost, or nothing can be saved."""
    if not run.state_is_consistent or not run.processes.is_main or run.step == run.first_step:
        return ""
    try:
        saved = save_with_fallback(run.save_state, run.config.output.name)
    except Exception as error:  # whatever it is, lack of memory is what must be told
        log.warning("the state after step %d could not be saved: %s", run.step, error)
        return ""
    resume = f"--resume {saved.path}" if saved.refusal else "--resume"
    return (
        f" The state after step {run.step} is in {saved.path}; run the same command with {resume} to go on from it,"
        " with gradient_checkpointing or stream_base as you like."
    )
