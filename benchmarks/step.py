"""How long a training step takes, against the frozen floor and against PEFT.

    python benchmarks/step.py            # full-size SD 1.5, 256 px, batch 1, rank 16, on the GPU if there is one
    python benchmarks/step.py --device cpu
    python benchmarks/step.py --model tiny --size 64    # a small model, to try the script

Each variant runs in a process of its own, so that its peak memory and its time to the first step,
from the start of the process, are its own; the rounds are interleaved, so that a slow minute of the machine
meets all of them. What is printed are the fastest medians over the rounds, and ratios to the floor.

Variants: `floor` (the frozen U-Net of diffusers, forward and input-gradient backward, nothing adapted),
`lorakit` (its whole step: batch, forward, backward, clipping, AdamW, with the defaults of its config), `peft` (PEFT's
LoRA on the same layers, in a plain loop with the same AdamW and clipping). On a GPU each waits for it after a step,
memory is what PyTorch reserved there, and `floor replayed` is the floor as a CUDA graph: what no adapter can beat.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lorakit.data.loader import Batch
    from lorakit.training.run import Run

STARTED = time.perf_counter()
HERE = Path(__file__).parent
VARIANTS = ("floor", "floor replayed", "lorakit", "peft")
MODELS = {"full": "model.safetensors", "tiny": "tiny", "sdxl": "sdxl.safetensors", "tiny-sdxl": "tiny-sdxl"}
"""Where models are in the folder of a measurement."""
PEFT_TARGETS = r".*attentions.*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)"


def main() -> None:
    """Run the variants and print the table, or run one of them and print its numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorakit-benchmark")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", choices=("full", "tiny"), default="full")
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after the first")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.variant:
        timer = Timer(arguments.steps, _device(arguments))
        runs = {"floor": run_floor, "floor replayed": run_floor, "lorakit": run_lorakit, "peft": run_peft}
        runs[arguments.variant](arguments, timer)
        print(json.dumps(timer.numbers()))
        return
    prepare(arguments)
    print_table(measure(arguments), arguments)


class Timer:
    """Takes the time of steps: the first from the start of the process, the others from the one before."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.wanted = steps + 1
        self.device = device
        self.times: list[float] = []
        self._last = STARTED

    def step_done(self) -> bool:
        """Note a step, once the device has finished it; whether there have been enough."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now - self._last)
        self._last = now
        return len(self.times) >= self.wanted

    def numbers(self) -> dict[str, float]:
        """Seconds until the first step began, seconds of a step (median), and peak memory in GiB.

        The first step is taken to have been as long as the others. Memory is the GPU's if steps are computed there.
        """
        import torch

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved() / 2**30
        step = statistics.median(self.times[1:])
        return {"ready": self.times[0] - step, "step": step, "memory": peak}


def prepare(arguments: argparse.Namespace) -> None:
    """Write the models, the image and the config, and fill lorakit's cache."""
    prepare_files(arguments.work, arguments.model)
    if arguments.model == "full" and not (arguments.work / "model" / "model_index.json").exists():
        subprocess.run([sys.executable, HERE / "make_model.py", arguments.work / "model", "--folder"], check=True)
    subprocess.run([sys.executable, "-m", "lorakit", "cache", config_file(arguments)], check=True)


def prepare_files(work: Path, model: str = "") -> None:
    """Write an image with its caption and the model: one file, or a tiny one as a folder, unless it is there."""
    from skimage import data
    from skimage.io import imsave

    (work / "images").mkdir(parents=True, exist_ok=True)
    imsave(work / "images" / "astronaut.png", data.astronaut())
    (work / "images" / "astronaut.txt").write_text("a portrait of an astronaut\n")
    if not model or (path := work / MODELS[model]).exists():
        return
    if path.suffix:
        options = ["--architecture", "sdxl", "--dtype", "bf16"] if model == "sdxl" else []
        subprocess.run([sys.executable, HERE / "make_model.py", path, *options], check=True)
        return
    from lorakit.testing.models import make_tiny_sd1, make_tiny_sdxl

    (make_tiny_sdxl if model == "tiny-sdxl" else make_tiny_sd1)(path)


def config_file(arguments: argparse.Namespace) -> Path:
    """The lorakit config of the measured run."""
    path: Path = arguments.work / "config.toml"
    path.write_text(f"""
model = {{ path = "{MODELS[arguments.model]}" }}
data = {{ image_dir = "images", resolution = {arguments.size}, num_repeats = 1000 }}
network = {{ name = "lierla", rank = {arguments.rank}, alpha = {arguments.rank}.0, parts = ["unet"] }}
optimizer = {{ name = "adamw", lr = 1e-4 }}
training = {{ max_steps = 100000, mixed_precision = "{arguments.precision}", device = "{arguments.device}" }}
output = {{ dir = "out" }}
""")
    return path


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The best numbers of each variant over the rounds."""
    best: dict[str, dict[str, float]] = {}
    names = ("work", "device", "model", "size", "rank", "precision", "steps")
    options = [f"--{name}={getattr(arguments, name)}" for name in names]
    has_graphs = _device(arguments).type == "cuda"
    for _ in range(arguments.rounds):
        for variant in VARIANTS:
            if variant == "floor replayed" and not has_graphs:
                continue
            command = [sys.executable, __file__, f"--variant={variant}", *options]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            numbers = json.loads(output.splitlines()[-1])
            known = best.setdefault(variant, numbers)
            best[variant] = {name: min(known[name], numbers[name]) for name in numbers}
    return best


def print_table(best: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    """Print the numbers as a Markdown table, with ratios to the floor."""
    import torch

    is_cuda = _device(arguments).type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else f"{torch.get_num_threads()} threads"
    print(
        f"\n{arguments.model} SD 1.5, {arguments.size} px, batch 1, rank {arguments.rank}, "
        f"mixed_precision {arguments.precision}, torch {torch.__version__}, {device}\n"
    )
    print("| variant | step (s) | ÷ floor | peak memory (GiB) | ÷ floor | ready after (s) | ÷ PEFT |")
    print("|---|---|---|---|---|---|---|")
    floor, peft = best["floor"], best["peft"]
    for variant, numbers in best.items():
        print(
            f"| {variant} | {numbers['step']:.4g} | {numbers['step'] / floor['step']:.2f} "
            f"| {numbers['memory']:.2f} | {numbers['memory'] / floor['memory']:.2f} "
            f"| {numbers['ready']:.1f} | {numbers['ready'] / peft['ready']:.2f} |"
        )


def run_floor(arguments: argparse.Namespace, timer: Timer) -> None:
    """Forward and input-gradient backward of the frozen U-Net."""
    import torch
    from diffusers import UNet2DConditionModel

    dtype, device = _dtype(arguments), timer.device
    unet = UNet2DConditionModel.from_pretrained(_folder(arguments) / "unet", torch_dtype=dtype).to(device)
    unet.requires_grad_(False)
    latents = torch.randn(1, 4, *_sides(arguments), device=device)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, dtype=dtype, device=device)
    timesteps, target = torch.randint(1000, (1,), device=device), torch.randn_like(latents)

    def step() -> None:
        prediction = unet(latents.to(dtype).requires_grad_(), timesteps, text).sample
        torch.nn.functional.mse_loss(prediction.float(), target).backward()

    _repeat(timer, captured(step, device) if arguments.variant == "floor replayed" else step)


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step as a CUDA graph."""
    from lorakit.training.step.cuda_graphs import WARM_UPS, GraphMemory

    memory = GraphMemory(device)
    with memory.held():
        with memory.allocating():
            for _ in range(WARM_UPS):
                step()
        return memory.capture(step)


def whole_step(run: Run, forward_backward: Callable[[Batch], None]) -> Callable[[], None]:
    """A step as the loop takes it, without observers."""
    steps = run.schedule.steps_from(0, run.prefetched(run.schedule.batches_from(0, run.loader)))

    def step() -> None:
        own = next(steps)
        for batch in own.batches:
            forward_backward(batch)
        run.update(own)
        run.advance(own)

    return step


def run_lorakit(arguments: argparse.Namespace, timer: Timer) -> None:
    """Lorakit's own loop, with an observer that takes the time and asks to stop."""
    from lorakit.api.observer import Observer
    from lorakit.config.load import read_config
    from lorakit.errors import Interrupted
    from lorakit.training.loop import train
    from lorakit.training.observers import Observers
    from lorakit.training.prepare import prepare
    from lorakit.training.run_handle import RunHandle
    from lorakit.training.runtime.distributed import Distributed
    from lorakit.training.setup import build_run

    class Stopwatch(Observer):
        def step_finished(self, step: int) -> None:
            if timer.step_done():
                raise Interrupted(f"measured {step} steps")

    config = read_config(arguments.work / "config.toml")
    processes = Distributed.init(config.training.device)
    run = build_run(prepare(config), processes)
    try:
        train(RunHandle(run, Observers([("stopwatch", True, Stopwatch())])))
    except Interrupted:
        return


def run_peft(arguments: argparse.Namespace, timer: Timer) -> None:
    """A plain loop with diffusers and PEFT: everything read, image and caption encoded, then steps."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.utils import load_image
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer

    dtype, folder, device = _dtype(arguments), _folder(arguments), timer.device
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device).requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(device)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=dtype).to(device)
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        "a portrait of an astronaut", padding="max_length", return_tensors="pt"
    ).input_ids.to(device)
    image = load_image(str(arguments.work / "images" / "astronaut.png")).resize((arguments.size, arguments.size))
    pixels = torch.tensor(list(image.getdata()), dtype=dtype, device=device).view(1, arguments.size, arguments.size, 3)
    with torch.no_grad():
        text = encoder(tokens).last_hidden_state
        latents = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.sample() * 0.18215
    del vae, encoder
    unet.add_adapter(LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=PEFT_TARGETS))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def step() -> None:
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (1,), device=device)
        prediction = unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        torch.nn.functional.mse_loss(prediction.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    _repeat(timer, step)


def _repeat(timer: Timer, step: Callable[[], None]) -> None:
    step()
    while not timer.step_done():
        step()


def _device(arguments: argparse.Namespace) -> torch.device:
    import torch

    is_cuda = arguments.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if is_cuda else "cpu")


def _folder(arguments: argparse.Namespace) -> Path:
    """The model as a folder, as diffusers reads it."""
    path: Path = arguments.work / ("tiny" if arguments.model == "tiny" else "model")
    return path


def _sides(arguments: argparse.Namespace) -> tuple[int, int]:
    """Height and width of latents."""
    from diffusers import AutoencoderKL

    levels = len(AutoencoderKL.load_config(_folder(arguments) / "vae")["block_out_channels"])
    side = arguments.size // 2 ** (levels - 1)
    return side, side


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    import torch

    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.precision]


if __name__ == "__main__":
    main()
