"""How long a step takes in each mode and on each rung of the ladder of memory, and how exact it is.

    python benchmarks/modes.py                           # full-size SD 1.5, 512 px, batch 1, rank 16, on a GPU
    python benchmarks/modes.py --batch 16
    python benchmarks/modes.py --model sdxl --size 1024
    python benchmarks/modes.py --model tiny --size 64 --device cpu    # a small model, on any machine

Each row runs in a process of its own, after its imports, with the same factors, which have an effect, and the same
images and noise. `floor` is the frozen U-Net, forward and input-gradient backward, nothing adapted; rows with graphs
are compared with the floor that is a CUDA graph. The gradients of the first micro-batch are compared with those of
the row `float32`: how far all of them are off, and those of the factor that is off the most, as shares of their
norms; factors with less than a ten-thousandth of the norm do not count. The share of the matrix rate is the floor's
arithmetic, by the time of a row and the rate at which this machine multiplies large matrices in the row's number
format.

Rows are overrides of the config, as `lorakit train --set` takes them. Those that need CUDA are left out elsewhere.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from step import MODELS, captured, prepare_files, whole_step

if TYPE_CHECKING:
    import torch

    from lorakit.config.train_config import TrainConfig
    from lorakit.models.base import BaseModel
    from lorakit.training.runtime.distributed import Distributed

Numbers = dict[str, float]

BF16, GRAPHS, LAST = "training.mixed_precision=bf16", "training.cuda_graphs=true", "training.channels_last=true"
COMPILED, RECOMPUTED = "training.compile=true", "training.gradient_checkpointing=true"
AUTO = tuple(f"training.{key}=auto" for key in ("cuda_graphs", "channels_last", "compile"))
INT8, NF4, STREAMED = (f'training.{key}=["unet"]' for key in ("int8_base", "nf4_base", "stream_base"))

ROWS: dict[str, tuple[str, ...]] = {
    "floor float32": (),
    "float32": (),
    "float32 tf32": ("training.tf32=true",),
    "float32 tf32 graphs": ("training.tf32=true", GRAPHS),
    "floor float32 graphs": (GRAPHS,),
    "floor bf16": (BF16,),
    "floor bf16 graphs": (BF16, GRAPHS),
    "bf16": (BF16,),
    "bf16 channels_last": (BF16, LAST),
    "bf16 graphs": (BF16, GRAPHS),
    "bf16 graphs channels_last": (BF16, GRAPHS, LAST),
    "bf16 compile": (BF16, COMPILED),
    "bf16 compile graphs": (BF16, COMPILED, GRAPHS),
    "bf16 compile graphs channels_last": (BF16, COMPILED, GRAPHS, LAST),
    "bf16 auto": (BF16, *AUTO),
    "bf16 graphs cudnn": (BF16, GRAPHS, 'attention.kernels=["cudnn", "flash"]'),
    "bf16 graphs flash": (BF16, GRAPHS, 'attention.kernels=["flash"]'),
    "bf16 graphs efficient": (BF16, GRAPHS, 'attention.kernels=["efficient"]'),
    "bf16 half recomputed": (BF16, "training.gradient_checkpointing=0.5"),
    "bf16 recomputed": (BF16, RECOMPUTED),
    "bf16 recomputed graphs": (BF16, RECOMPUTED, GRAPHS),
    "bf16 int8": (BF16, INT8),
    "bf16 int8 recomputed": (BF16, INT8, RECOMPUTED),
    "bf16 nf4": (BF16, NF4),
    "bf16 nf4 recomputed": (BF16, NF4, RECOMPUTED),
    "bf16 nf4 recomputed graphs": (BF16, NF4, RECOMPUTED, GRAPHS),
    "bf16 streamed": (BF16, STREAMED),
    "bf16 streamed recomputed": (BF16, STREAMED, RECOMPUTED),
}
"""Overrides of the config, by the name of the row."""

COLUMNS = ("row", "step (ms)", "÷ floor", "images/s", "of matrix rate", "memory (GiB)", "÷ floor", "off by", "at most")
WARM_UPS = 3


def main() -> None:
    """Run the rows and print the table, or run one of them and print its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorakit-benchmark")
    parser.add_argument("--model", choices=MODELS, default="full")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after some that are not")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(run_row(arguments)))
        return
    write_config(arguments)
    print_table(dict(measure(arguments)), arguments)


def write_config(arguments: argparse.Namespace) -> None:
    """Write the model, the image and the config, and fill the cache."""
    prepare_files(arguments.work, arguments.model)
    config = arguments.work / "modes.toml"
    config.write_text(f"""
model = {{ path = "{MODELS[arguments.model]}", no_half_vae = true }}
network = {{ name = "lierla", rank = {arguments.rank}, alpha = {arguments.rank}.0, parts = ["unet"] }}
optimizer = {{ name = "adamw", lr = 1e-4 }}
training = {{ max_steps = 1000000, device = "{arguments.device}", mixed_precision = "no", cuda_graphs = false }}
output = {{ dir = "out" }}
[data]
image_dir = "images"
resolution = {arguments.size}
batch_size = {arguments.batch}
num_repeats = {1000 * arguments.batch}
""")
    for is_half in {BF16 in ROWS[row] for row in arguments.only}:
        options = [f"--set={BF16}"] if is_half else []
        subprocess.run([sys.executable, "-m", "lorakit", "cache", config, *options], check=True)


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, Numbers]]:
    """The numbers of each row that this machine can run."""
    import torch

    names = ("work", "model", "size", "batch", "rank", "device", "steps")
    options = [f"--{name}={getattr(arguments, name)}" for name in names]
    has_cuda = arguments.device != "cpu" and torch.cuda.is_available()
    for row in arguments.only:
        if not has_cuda and any(word in row for word in ("graphs", "tf32", "streamed")):
            continue
        command = [sys.executable, __file__, f"--row={row}", *options]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            print(f"{row}: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        else:
            yield row, json.loads(result.stdout.splitlines()[-1])


def run_row(arguments: argparse.Namespace) -> Numbers:
    """Seconds of a step and peak memory in GiB; of floors also the operations of a step, and the rate of matrices."""
    import torch

    from lorakit.config.load import read_config
    from lorakit.training.runtime.distributed import Distributed

    config = read_config(arguments.work / "modes.toml", ROWS[arguments.row])
    processes = Distributed.init(config.training.device)
    step, numbers = (floor_step if arguments.row.startswith("floor") else lorakit_step)(config, processes, arguments)
    for _ in range(WARM_UPS):
        step()
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    processes.synchronize()
    started = time.perf_counter()
    for _ in range(arguments.steps):
        step()
    processes.synchronize()
    seconds = (time.perf_counter() - started) / arguments.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    if processes.device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
    return {"step": seconds, "memory": peak / 2**30, **numbers}


def lorakit_step(
    config: TrainConfig, processes: Distributed, arguments: argparse.Namespace
) -> tuple[Callable, Numbers]:
    """Lorakit's whole step, in its mode; the gradients of the first micro-batch are written down before."""
    import torch

    from lorakit.training.prepare import prepare
    from lorakit.training.setup import build_run
    from lorakit.training.step.autotune import compile_step
    from lorakit.training.step.numerics import numerics_of

    run = build_run(prepare(config), processes)
    with torch.no_grad():
        for adapter in run.network.adapters:
            generator = torch.Generator().manual_seed(adapter.lora_up.numel())
            adapter.lora_up.copy_(torch.randn(adapter.lora_up.shape, generator=generator).mul_(1e-2))
    ExitStack().enter_context(numerics_of(run))  # until the process ends
    forward_backward = compile_step(run)
    forward_backward(next(run.schedule.batches_from(0, run.loader)).to(processes.device))
    gradients = [parameter.grad.cpu() for parameter in run.gradients.parameters]
    torch.save(gradients, gradients_file(arguments, arguments.row))
    run.gradients.zero()
    run.loss.zero_()
    return whole_step(run, forward_backward), {}


def floor_step(config: TrainConfig, processes: Distributed, arguments: argparse.Namespace) -> tuple[Callable, Numbers]:
    """The frozen U-Net's forward and input-gradient backward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lorakit.training.setup import build_model

    model = build_model(config, processes.device)
    shape = arguments.batch, *model.latent_shape(arguments.size, arguments.size)
    latents = torch.randn(shape, device=processes.device)
    conditioning = imagined_conditioning(model, arguments.batch)
    timesteps = torch.full((arguments.batch,), 500, device=processes.device)

    def step() -> None:
        model.predict(latents.clone().requires_grad_(), timesteps, conditioning).float().square().mean().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    if config.training.cuda_graphs:
        step = captured(step, processes.device)
    return step, {"operations": counter.get_total_flops(), "rate": matrix_rate(model.dtype, processes)}


def imagined_conditioning(model: BaseModel, images: int) -> dict[str, torch.Tensor]:
    """Random captions of 77 tokens, and for SDXL what else its U-Net takes."""
    import torch

    keys = (target.module for target in model.targets(["unet"]) if target.path.endswith("attn2.to_k"))
    found = {"hidden_states": torch.randn(images, 77, next(keys).in_features, device=model.device)}
    if added := model.denoiser.add_embedding:
        sizes = torch.full((images, 6), 1024.0, device=model.device)
        width = added.linear_1.in_features - 6 * (model.denoiser.settings.addition_time_embed_dim or 256)
        found |= {"text_embeds": torch.randn(images, width, device=model.device), "time_ids": sizes}
    return found


def matrix_rate(dtype: torch.dtype, processes: Distributed) -> float:
    """Operations in a second of products of large matrices, the fastest of some."""
    import torch

    side = 8192 if processes.device.type == "cuda" else 1024
    matrix, seconds = torch.randn(side, side, device=processes.device).to(dtype), []
    for _ in range(8):
        processes.synchronize()
        started = time.perf_counter()
        matrix @ matrix
        processes.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def gradients_file(arguments: argparse.Namespace, row: str) -> Path:
    """Where a row writes its gradients."""
    path: Path = arguments.work / f"gradients {row}.pt"
    return path


def differences(arguments: argparse.Namespace, row: str) -> tuple[float, float]:
    """How far the gradients of a row are off those of `float32`: all together, and the worst factor's."""
    import torch

    exact, found = (torch.load(gradients_file(arguments, name)) for name in ("float32", row))
    off = torch.stack([(one - other).norm() for one, other in zip(found, exact, strict=True)])
    norms = torch.stack([own.norm() for own in exact])
    return (off.norm() / norms.norm()).item(), (off / norms)[norms > 1e-4 * norms.norm()].max().item()


def print_table(rows: dict[str, Numbers], arguments: argparse.Namespace) -> None:
    """Print the numbers as a Markdown table."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() and arguments.device != "cpu" else "CPU"
    print(
        f"\nmodel {arguments.model}, {arguments.size} px, batch {arguments.batch}, rank {arguments.rank}, {device}, "
        f"torch {torch.__version__}\n\n"
        f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
    )
    for row, numbers in rows.items():
        words = row.removeprefix("floor ").split()
        name = f"floor {words[0]}" + (" graphs" if "graphs" in words else "")
        floor = rows.get(name)
        cells = [
            f"{1000 * numbers['step']:.1f}",
            ratio(numbers, floor, "step"),
            f"{arguments.batch / numbers['step']:.1f}",
        ]
        share = floor["operations"] / numbers["step"] / floor["rate"] if floor else None
        cells += ["" if share is None else f"{share:.0%}", f"{numbers['memory']:.2f}", ratio(numbers, floor, "memory")]
        compared = not row.startswith("floor") and "float32" in rows
        cells += [f"{value:.1e}" for value in differences(arguments, row)] if compared else ["", ""]
        print(f"| {row} | {' | '.join(cells)} |")


def ratio(numbers: Numbers, floor: Numbers | None, name: str) -> str:
    """A number by the floor's."""
    return f"{numbers[name] / floor[name]:.2f}" if floor else ""


if __name__ == "__main__":
    main()
