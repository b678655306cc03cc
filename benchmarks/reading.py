"""How much memory reading a model takes: the parts that a run needs, one after the other, as it reads and frees them.

    python benchmarks/make_model.py sdxl.safetensors --architecture sdxl --dtype bf16
    python benchmarks/reading.py sdxl.safetensors
    python benchmarks/reading.py sdxl.safetensors --precision no

On the CPU, weights in the run's number format stay mapped: their pages are the file's, which the system may drop at any
time, and no other memory is taken. Weights in another format are converted. Linux only: it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401 - before anything is measured
import torch
from torch import nn

from lorakit.config.train_config import TrainConfig
from lorakit.testing.runs import train_config
from lorakit.training.setup import load_model

GIB = 2**30


def main() -> None:
    """Read the parts and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="a model file or a diffusers folder")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16", help="training.mixed_precision")
    arguments = parser.parse_args()
    print("| part | weights (GiB) | anonymous, peak (GiB) | file pages, peak (GiB) | seconds |\n|---|---|---|---|---|")
    model = load_model(config_of(arguments), torch.device("cpu"))
    encoders = [own.part.name for own in model.modules if own.part.encoders]
    measure("VAE encoder", lambda: [model.vae_encoder.module])
    model.free("vae_encoder")
    measure("text encoders", lambda: [model.module(name) for name in encoders])
    model.free("text_encoder")
    measure("U-Net", lambda: [model.denoiser])


def config_of(arguments: argparse.Namespace) -> TrainConfig:
    """A config of a run on the model."""
    tables = {
        "model": {"path": str(arguments.model.absolute())},
        "data": {"image_dir": str(arguments.model.absolute().parent), "resolution": 512},
        "training": {"mixed_precision": arguments.precision, "device": "cpu", "max_steps": 1},
        "output": {"dir": "out"},
    }
    return train_config(tables, Path())


def measure(name: str, read: Callable[[], list[nn.Module]]) -> None:
    """Print a row about reading these modules and using each of their weights once."""
    before, started = resident(), time.perf_counter()
    with Watch() as watch:
        tensors = [tensor for module in read() for tensor in (*module.parameters(), *module.buffers())]
        for tensor in tensors:
            tensor.max()
    size = sum(tensor.nbytes for tensor in tensors)
    numbers = (size, *(watch.peak[kind] - before[kind] for kind in ("RssAnon", "RssFile")))
    cells = [f"{number / GIB:.2f}" for number in numbers]
    print(f"| {name} | {' | '.join(cells)} | {time.perf_counter() - started:.1f} |", flush=True)


def resident() -> dict[str, int]:
    """Resident memory of this process in bytes: `RssAnon`, anonymous, and `RssFile`, mapped files."""
    status = Path("/proc/self/status").read_text()
    return {kind: 1024 * int(size) for kind, size in re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB$", status, re.M)}


class Watch:
    """The most memory of each kind within a block, looked at every hundredth of a second."""

    def __init__(self) -> None:
        self.peak = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self.peak = {kind: max(self.peak[kind], size) for kind, size in resident().items()}


if __name__ == "__main__":
    main()
