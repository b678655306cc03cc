"""Writes a model with the architecture of Stable Diffusion 1.5 and random weights, to measure with.

    python benchmarks/make_model.py sd15.safetensors
    python benchmarks/make_model.py sd15-half.ckpt --dtype fp16
    python benchmarks/make_model.py sd15-folder --folder

Float32 takes 4.3 GB on disk, and about twice that in memory while it is written.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lorakit.testing.models import FULL_SD1, make_folder, to_single_file

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main() -> None:
    """Write the model that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a full-size Stable Diffusion 1.5 with random weights.")
    parser.add_argument("path", type=Path, help="the .safetensors or .ckpt file, or the folder, to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="number format of the weights")
    parser.add_argument("--folder", action="store_true", help="write a diffusers folder instead of a single file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    if arguments.folder:
        make_folder(arguments.path, FULL_SD1, arguments.seed, DTYPES[arguments.dtype])
    else:
        with tempfile.TemporaryDirectory(dir=arguments.path.absolute().parent) as folder:
            make_folder(Path(folder), FULL_SD1, arguments.seed, DTYPES[arguments.dtype])
            to_single_file(Path(folder), arguments.path)
    print(arguments.path)


if __name__ == "__main__":
    main()
