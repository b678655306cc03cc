"""What a plan says, in text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from lorakit.config.memory_presets import preset_diff, to_toml
from lorakit.config.values import toml_repr
from lorakit.data.batch_sampler import buckets
from lorakit.planning.estimate import with_reserve
from lorakit.planning.plan import Plan, schedule_of
from lorakit.training.prepare import PreparedRun
from lorakit.utils.bytes import in_gib
from lorakit.utils.text_table import columns
from lorakit.utils.wording import counted


def report(plan: Plan, memory: int | None = None) -> Iterator[str]:
    """The lines of a plan but for the data; with `memory`, in bytes, also what to set so that training fits into it."""
    training = plan.current.memory
    rows = [("encoding images", in_gib(plan.images.peak))]
    if plan.captions is not None:
        rows.append(("encoding captions", in_gib(plan.captions)))
    rows += [
        (f"training, batches of {plan.largest.images} at {_size(plan.largest.size)}", in_gib(training.peak)),
        ("  frozen weights", in_gib(training.weights)),
        ("  adapters, gradients, optimizer state", in_gib(training.trained)),
        ("  activations", in_gib(training.activations)),
    ]
    if training.graphs:
        rows.append(("  CUDA graphs, held in the steps that are not captured", in_gib(training.graphs)))
    yield from columns(("phase", "memory in GiB, estimated"), rows)
    if plan.precision.reason:
        yield from _wrapped(f"Estimated for {plan.precision}")
    yield from ("", "TRAINING IN GIB, ESTIMATED, WITH THESE KEYS OF [TRAINING]")
    for preset in plan.presets:
        here = "  <- the current config" if preset.is_config else ""
        yield from _wrapped(f"{in_gib(preset.memory.peak):>6}  {preset}{here}", indent=8)
        if preset.is_config and plan.could_be_half:
            yield f"{'~' + in_gib(_in_half_precision(plan)):>6}  {_half_precision(plan)}  (also faster on a GPU)"
    yield ""
    if memory is not None:
        yield from _advice(plan, memory)
        yield ""
    yield from _times(plan)


def data_report(prepared: PreparedRun) -> Iterator[str]:
    """The lines about images and steps, which take no time to find."""
    schedule, images = schedule_of(prepared), prepared.images
    rows = [
        (_size(bucket.size), str(bucket.appearances), str(bucket.batch_size), str(bucket.micro_batches))
        for bucket in buckets(prepared.datasets)
    ]
    yield from columns(("bucket", "images, with repeats", "batch size", "batches per epoch"), rows)
    yield ""
    yield from _wrapped(
        f"{counted(images, 'image')}; {counted(schedule.micro_batches_per_epoch, 'batch', 'batches')} and "
        f"{counted(schedule.steps_per_epoch, 'step')} per epoch; {counted(schedule.total_steps, 'step')} in all, "
        f"{counted(schedule.total_epochs, 'epoch')}"
    )


def _advice(plan: Plan, memory: int) -> Iterator[str]:
    """The settings with which training fits into `memory` bytes."""
    given = f"{in_gib(memory)} GiB"
    fitting = next((preset for preset in plan.presets if preset.fits(memory)), None)
    if plan.current.fits(memory):
        yield from _wrapped(f"The current config fits into {given}, with {_reserve(plan.current.memory.peak)}.")
    half = _in_half_precision(plan)
    if plan.could_be_half and not plan.current.fits(memory) and with_reserve(half) <= memory:
        yield from _wrapped(f"What should fit into {given}, with {_reserve(half)}, and is also faster on a GPU:")
        yield from ("", "[training]", _half_precision(plan))
    elif fitting is None:
        least = min(plan.presets, key=lambda preset: preset.memory.peak)
        yield from _wrapped(
            f"No preset fits into {given}: the smallest, {least}, needs {in_gib(least.memory.peak)} GiB,"
            f" with {_reserve(least.memory.peak)}. What else helps: {', '.join(_other_ways(plan))}."
        )
    elif not fitting.is_config:
        keys = preset_diff(fitting.training, plan.prepared.config.training)
        yield from _wrapped(f"The fastest that fits into {given}, with {_reserve(fitting.memory.peak)}:")
        yield from ("", "[training]", *to_toml(keys))
        if plan.could_be_half:
            yield ""
            yield from _wrapped(
                f"With {_half_precision(plan)}, which is also faster on a GPU, fewer of these may suffice."
            )


def _reserve(peak: int) -> str:
    """What is to be left free beside training that needs `peak` bytes."""
    return f"{in_gib(with_reserve(peak) - peak)} GiB left for fragmentation and the device's driver"


def _half_precision(plan: Plan) -> str:
    """The line of `[training]` that asks for half precision."""
    return f'mixed_precision = "{plan.half_precision}"'


def _in_half_precision(plan: Plan) -> int:
    """About what training would need in half precision, in bytes: half of all but what is trained."""
    memory = plan.current.memory
    return (memory.weights + memory.activations) // 2 + memory.trained


def _wrapped(text: str, indent: int = 0) -> list[str]:
    """The text in lines of 80 columns; later ones indented."""
    return textwrap.wrap(
        text, 80, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def _other_ways(plan: Plan) -> Iterator[str]:
    """What saves memory besides the presets, and is not set yet."""
    config = plan.prepared.config
    if plan.could_be_half:
        yield f"training.{_half_precision(plan)}"
    if plan.largest.images > 1:
        yield f"a data.batch_size below {plan.largest.images}"
    yield "a lower data.resolution"
    denoisers = [part.name for part in config.model.parts if part.name in config.trained_parts and not part.encoders]
    if config.trains_text_encoders and denoisers:
        yield f"network.parts = {toml_repr(denoisers)}"
    if getattr(config.network, "rank", 1) > 1:
        yield "a lower network.rank"


def _times(plan: Plan) -> Iterator[str]:
    timing = plan.timing
    if timing is None:
        yield "No times are estimated: add --measure to load the model and time a few steps."
        return
    rows = [(f"{shape.images} of {_size(shape.size)}", f"{seconds:.3g}") for shape, seconds in timing.seconds.items()]
    yield from columns(("batch", f"seconds per step on {timing.device}, measured"), rows)
    yield ""
    minutes, hours = timing.run / 60, timing.run / 3600
    took = f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
    took = took if minutes >= 2 else f"{max(timing.run, 1):.0f} s"
    yield from _wrapped(f"All {plan.schedule.total_steps} steps: about {took}, without encoding, saves and previews")
    if timing.peak is not None:
        estimated = in_gib(plan.current.memory.peak)
        found = f"{in_gib(timing.peak)} GiB reserved, {estimated} GiB estimated"
        yield from _wrapped(f"Peak memory on {timing.device}: {found}")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
