"""Writes a full-size model with random weights, to measure with.

    python benchmarks/make_model.py sd15.safetensors
    python benchmarks/make_model.py sd15-half.ckpt --dtype fp16
    python benchmarks/make_model.py sd15-folder --folder
    python benchmarks/make_model.py sdxl.safetensors --architecture sdxl --dtype bf16

Stable Diffusion 1.5 takes 4.3 GB on disk in float32, Stable Diffusion XL 6.9 GB in bf16; a single file takes twice that
while it is written, on disk and in memory.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lorakit.testing.models import FULL_SD1, FULL_SDXL, make_folder, to_single_file

ARCHITECTURES = {"sd15": FULL_SD1, "sdxl": FULL_SDXL}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main() -> None:
    """Write the model that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a full-size model with random weights.")
    parser.add_argument("path", type=Path, help="the .safetensors or .ckpt file, or the folder, to write")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sd15", help="which model")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="number format of the weights")
    parser.add_argument("--folder", action="store_true", help="write a diffusers folder instead of a single file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    settings, dtype = ARCHITECTURES[arguments.architecture], DTYPES[arguments.dtype]
    if arguments.folder:
        make_folder(arguments.path, settings, arguments.seed, dtype)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.path.absolute().parent) as folder:
            make_folder(Path(folder), settings, arguments.seed, dtype)
            to_single_file(Path(folder), arguments.path)
    print(arguments.path)


if __name__ == "__main__":
    main()
