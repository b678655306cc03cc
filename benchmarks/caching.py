"""How long a run takes to know its images, and to encode them.

    python benchmarks/caching.py                     # 2000 images, a small VAE of random weights
    python benchmarks/caching.py --images 10000
    python benchmarks/caching.py --model sd15-folder --precision bf16 --size 512 --batch 8

Indexing: `headers` (a plain loop that opens every image for its size, and reads every caption), `cold` (lorakit's
first start, nothing known), `warm` (a later one, nothing changed), `found` (warm, and every image and caption found in
a full cache). Files are in the page cache, so the disk has no say.

Encoding: `loop` (decode, resize, encode with diffusers' VAE and write, one image after the other), `one` (lorakit,
one image at a time), `batch` (lorakit, several of one size at a time). What is encoded is deleted each time.

Each measurement runs in a process of its own, after its imports; the rounds are interleaved, and the fastest of each
is printed, and for how long cores computed, which other programs disturb less. Images are parts of the photographs
that scikit-image has, made once in the work folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lorakit.config.train_config import TrainConfig
    from lorakit.data.images.buckets import ResizeCrop

INDEXING = ("headers", "cold", "warm", "found")
ENCODING = ("loop", "one", "batch")
Numbers = dict[str, float]


def main() -> None:
    """Make what is missing, run the measurements and print the tables, or run one of them and print its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorakit-caching")
    parser.add_argument("--images", type=int, default=2000, help="how many to index")
    parser.add_argument("--encoded", type=int, default=200, help="how many to encode")
    parser.add_argument("--model", type=Path, help="folder of the model whose VAE encodes; a small one when absent")
    parser.add_argument("--size", type=int, default=256, help="side in pixels that images are encoded at")
    parser.add_argument("--batch", type=int, default=8, help="how many are encoded at once")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=INDEXING + ENCODING, default=INDEXING + ENCODING)
    parser.add_argument("--measure", choices=INDEXING + ENCODING, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        numbers = index(arguments) if arguments.measure in INDEXING else encode(arguments)
        print(json.dumps(numbers))
        return
    prepare(arguments)
    best = measure(arguments)
    print(*tables(best, arguments), sep="\n")


def prepare(arguments: argparse.Namespace) -> None:
    """Make the images and the small model, and fill the cache of the images that are indexed."""
    from make_images import make_images

    from lorakit.testing.models import make_tiny_sd1
    from lorakit.training.prepare import prepare
    from lorakit.training.setup import fill_cache

    if not (arguments.work / "model" / "model_index.json").exists():
        make_tiny_sd1(arguments.work / "model")
    make_images(indexed_folder(arguments), arguments.images, sides=(64, 320))
    make_images(encoded_folder(arguments), arguments.encoded, sides=(384, 1024))
    if "found" in arguments.only:
        fill_cache(prepare(indexing_config(arguments, "full")))


def indexed_folder(arguments: argparse.Namespace) -> Path:
    """The folder of the images that are indexed."""
    folder: Path = arguments.work / f"{arguments.images}-images"
    return folder


def encoded_folder(arguments: argparse.Namespace) -> Path:
    """The folder of the images that are encoded, which are larger."""
    folder: Path = arguments.work / f"{arguments.encoded}-larger-images"
    return folder


def indexing_config(arguments: argparse.Namespace, cache: str) -> TrainConfig:
    """Small buckets and the small model: how large images become has no say in how long it takes to know them."""
    return config(arguments, indexed_folder(arguments), cache, "resolution = 64, min_bucket_reso = 64", "no")


def encoding_config(arguments: argparse.Namespace) -> TrainConfig:
    """Images as large as was asked for, and the model that was asked for."""
    batch = 1 if arguments.measure == "one" else arguments.batch
    smallest = min(128, arguments.size)
    sizes = f"resolution = {arguments.size}, min_bucket_reso = {smallest}, encode_batch_size = {batch}"
    return config(arguments, encoded_folder(arguments), "encoded", sizes, arguments.precision)


def config(arguments: argparse.Namespace, folder: Path, cache: str, sizes: str, precision: str) -> TrainConfig:
    """A config as a file has it, for a run with this folder and this cache."""
    from lorakit.config.load import read_config

    model = arguments.model.absolute() if arguments.model and cache == "encoded" else arguments.work / "model"
    path = arguments.work / f"{cache}.toml"
    path.write_text(f"""
model = {{ path = {json.dumps(str(model))} }}
data = {{ image_dir = "{folder.name}", cache_dir = "cache-{cache}-{folder.name}", enable_bucket = true, {sizes} }}
network = {{ name = "lierla", rank = 4, parts = ["unet"] }}
optimizer = {{ name = "adamw", lr = 1e-4 }}
training = {{ max_steps = 1, mixed_precision = "{precision}", device = "{arguments.device}" }}
output = {{ dir = "out" }}
""")
    return read_config(path)


def measure(arguments: argparse.Namespace) -> dict[str, Numbers]:
    """The numbers of the fastest round of each measurement."""
    names = ("work", "images", "encoded", "model", "size", "batch", "precision", "device")
    options = [f"--{name}={getattr(arguments, name)}" for name in names if getattr(arguments, name) is not None]
    best: dict[str, Numbers] = {}
    for _ in range(arguments.rounds):
        for name in arguments.only:
            command = [sys.executable, __file__, f"--measure={name}", *options]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            numbers = json.loads(output.splitlines()[-1])
            known = best.setdefault(name, numbers)
            best[name] = min(known, numbers, key=lambda own: own["seconds"])
    return best


def tables(best: dict[str, Numbers], arguments: argparse.Namespace) -> Iterator[str]:
    """The numbers in Markdown, with ratios to the plain loops."""
    import torch

    yield f"\nPyTorch {torch.__version__}, {torch.get_num_threads()} threads\n"
    yield f"| {arguments.images} images indexed | seconds for 10000 | ÷ headers | computed | ÷ headers |"
    yield "|---|---|---|---|---|"
    for name in (own for own in INDEXING if own in best):
        cells = [name]
        for kind in ("seconds", "computed"):
            cells.append(f"{best[name][kind] * 10_000 / arguments.images:.2f}")
            cells.append(f"{best[name][kind] / best['headers'][kind]:.2f}" if "headers" in best else "")
        yield f"| {' | '.join(cells)} |"
    model = arguments.model.name if arguments.model else "a small VAE"
    settings = f"{arguments.size} px, {model}, mixed_precision {arguments.precision}, batch {arguments.batch}"
    yield f"\n| {arguments.encoded} images encoded: {settings} | images/s | ÷ loop | the VAE waits |\n|---|---|---|---|"
    for name in (own for own in ENCODING if own in best):
        seconds = best[name]["seconds"]
        ratio = f"{best['loop']['seconds'] / seconds:.2f}" if "loop" in best else ""
        yield f"| {name} | {arguments.encoded / seconds:.1f} | {ratio} | {1 - best[name]['busy'] / seconds:.0%} |"


def index(arguments: argparse.Namespace) -> Numbers:
    """Seconds that it takes to know the images."""
    from lorakit.training.prepare import prepare
    from lorakit.training.setup import fill_cache

    if arguments.measure == "headers":
        return timed(lambda: read_headers(indexed_folder(arguments)))
    settings = indexing_config(arguments, "none" if arguments.measure == "cold" else "full")
    if arguments.measure != "found":
        return timed(lambda: prepare(settings))
    return timed(lambda: fill_cache(prepare(settings)))


def read_headers(folder: Path) -> list[tuple[tuple[int, int], str]]:
    """Size and caption of each image."""
    from PIL import Image

    found = []
    for path in sorted(path for path in folder.iterdir() if path.suffix != ".txt"):
        with Image.open(path) as image:
            found.append((image.size, path.with_suffix(".txt").read_text()))
    return found


def timed(work: Callable[[], object]) -> Numbers:
    """Seconds that something takes, and seconds in which cores compute it, which other programs change less."""
    started, computed = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - started, "computed": time.process_time() - computed}


class Busy:
    """How many seconds a module computes."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._started = 0.0
        self._device = next(module.parameters()).device
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds += time.perf_counter() - self._started


def encode(arguments: argparse.Namespace) -> Numbers:
    """Seconds that it takes to encode the images from decoding to the disk, and those in which the VAE computes."""
    settings = encoding_config(arguments)
    shutil.rmtree(settings.cache_dir, ignore_errors=True)
    if arguments.measure == "loop":
        return encode_in_a_loop(arguments, settings)
    from lorakit.data.cache.encode import EncodeOptions, encode_latents
    from lorakit.training.prepare import prepare
    from lorakit.training.runtime.distributed import Distributed
    from lorakit.training.setup import build_model

    prepared, device = prepare(settings), Distributed.init(settings.training.device).device
    model = build_model(settings, device)
    encoding = EncodeOptions(device=device, batch_size=settings.data.encode_batch_size or 1)
    busy = Busy(warmed_up(model.vae_encoder.module.get_submodule("encoder")))
    model.fingerprint("vae_encoder")
    numbers = timed(lambda: encode_latents(prepared.datasets, model, prepared.cache, encoding))
    return {**numbers, "busy": busy.seconds}


def encode_in_a_loop(arguments: argparse.Namespace, settings: TrainConfig) -> Numbers:
    """The same images, at the same sizes, one after the other."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from lorakit.training.prepare import prepare
    from lorakit.training.runtime.distributed import Distributed
    from lorakit.training.runtime.precision import DTYPES

    (dataset,) = prepare(settings).datasets
    device, dtype = Distributed.init(settings.training.device).device, DTYPES[arguments.precision]
    folder = arguments.model or arguments.work / "model"
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(device)
    busy = Busy(warmed_up(vae.encoder))
    settings.cache_dir.mkdir()

    def work() -> None:
        for number, example in enumerate(dataset.examples):
            pixels = opened(example.image, example.placement)
            with torch.no_grad():
                distribution = vae.encode((pixels.to(device) / 127.5 - 1).to(dtype)).latent_dist
            entry = {"mean": distribution.mean.cpu(), "std": distribution.std.cpu()}
            save_file(entry, settings.cache_dir / f"{number}.safetensors")

    return {**timed(work), "busy": busy.seconds}


def opened(path: Path, placement: ResizeCrop) -> torch.Tensor:
    """An image as it is encoded, uint8 [1, 3, H, W]."""
    import numpy as np
    import torch
    from PIL import Image

    (left, top), (width, height) = placement.crop_xy, placement.bucket
    with Image.open(path) as image:
        resized = image.convert("RGB").resize(placement.resized, Image.Resampling.LANCZOS)
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def warmed_up(module: torch.nn.Module) -> torch.nn.Module:
    """The module, after one image that is not measured, since the first one loads libraries."""
    import torch

    parameter = next(module.parameters())
    with torch.no_grad():
        module(torch.zeros(1, 3, 64, 64, device=parameter.device, dtype=parameter.dtype))
    return module


if __name__ == "__main__":
    main()
