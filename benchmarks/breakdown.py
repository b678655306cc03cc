"""Where the time of a training step goes: on the host, on the device, and by kernel.

    python benchmarks/modes.py --only bf16               # writes model, image and config
    python benchmarks/breakdown.py training.mixed_precision=bf16 training.cuda_graphs=true

Arguments are overrides of the config that `modes.py` writes. With the environment variable `OUT`, a trace for
https://ui.perfetto.dev is written to that folder.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from step import captured, whole_step

if TYPE_CHECKING:
    from lorakit.training.run import Run

SHOWN = 30


def main() -> None:
    """Take some steps and print what they take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorakit-benchmark")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()

    from lorakit.config.load import read_config
    from lorakit.training.prepare import prepare
    from lorakit.training.setup import build_run, init_distributed
    from lorakit.training.step.numerics import numerics_of

    prepared, processes = init_distributed(prepare(read_config(arguments.work / "modes.toml", arguments.overrides)))
    run = build_run(prepared, processes)
    with numerics_of(run):
        report(run, arguments)


def report(run: Run, arguments: argparse.Namespace) -> None:
    """Print the times of whole steps, the kernels of one, and the time of the frozen denoiser as a CUDA graph."""
    import torch

    from lorakit.training.step.autotune import compile_step

    step, is_cuda = whole_step(run, compile_step(run)), run.processes.device.type == "cuda"
    measured(run, step, arguments.steps)  # captures, compiles and allocates
    host, wall = measured(run, step, arguments.steps)
    print(f"{' '.join(arguments.overrides)}: host {host:.1f} ms, wall {wall:.1f} ms a step")
    if is_cuda:
        print(f"reserved {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB")
    activity = torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        measured(run, step, 1)

    def busy(own: torch.autograd.profiler_util.FunctionEventAvg) -> float:
        return (own.self_device_time_total if is_cuda else own.self_cpu_time_total) / 1e3

    rows = sorted(profile.key_averages(), key=busy, reverse=True)
    print(f"kernels {sum(own.count for own in rows)}, busy {sum(map(busy, rows)):.2f} ms")
    for own in rows[:SHOWN]:
        print(f"{busy(own):8.3f} ms {own.count:5d}x  {own.key[:100]}")
    if folder := os.environ.get("OUT"):
        profile.export_chrome_trace(f"{folder}/trace.json.gz")
    frozen = frozen_step(run)
    alone = captured(frozen, run.processes.device) if is_cuda else frozen
    print(f"frozen denoiser{', replayed' if is_cuda else ''}: {measured(run, alone, arguments.steps)[1]:.1f} ms")


def frozen_step(run: Run) -> Callable[[], None]:
    """Forward and input-gradient backward pass of the denoiser without its adapters."""
    from lorakit.training.setup import build_model

    model = build_model(run.config, run.processes.device)
    batch = next(run.schedule.batches_from(0, run.loader)).to(run.processes.device)
    conditioning = run.encode(batch)
    predict = partial(model.predict, timesteps=batch.timesteps, conditioning=conditioning)

    def step() -> None:
        predict(batch.latents.clone().requires_grad_()).float().square().mean().backward()

    return step


def measured(run: Run, step: Callable[[], None], count: int) -> tuple[float, float]:
    """Milliseconds of a step: until Python has launched it, and until the device has finished it."""
    run.processes.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        step()
    host = time.perf_counter() - began
    run.processes.synchronize()
    return 1e3 * host / count, 1e3 * (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
