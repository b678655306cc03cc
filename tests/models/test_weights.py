"""Weights come straight from the file: mapped, without a second copy, in the number format asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import ModelError
from lorakit.models.weights.load import open_tensors
from tests.models.building import stable_diffusion


def mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """Where in this process's memory a file is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = [line[0].split("-") for line in lines if line[-1] == str(file)]
    return [(int(start, 16), int(end, 16)) for start, end in places]


@pytest.mark.parametrize("form", ["tiny_sd1_file", "tiny_sd1_ckpt", "tiny_sd2_file", "tiny_sd2_ckpt"])
def test_parameters_are_views_of_the_file(request: pytest.FixtureRequest, form: str) -> None:
    """On the CPU, every parameter of every part lies in the mapped file: there is no second copy, even of thirds."""
    file = request.getfixturevalue(form)
    model = stable_diffusion(file)
    modules = [model.denoiser, model.text_encoder.module, model.vae_encoder.module]
    ranges = mapped_ranges(file)
    assert ranges
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        assert any(start <= parameter.data_ptr() < end for start, end in ranges)


def test_training_leaves_the_file_alone(tiny_sd1_file: Path) -> None:
    """Writing to a mapped parameter changes the process's memory, never the file."""
    before = tiny_sd1_file.read_bytes()
    parameter = next(stable_diffusion(tiny_sd1_file).denoiser.parameters())
    parameter.add_(1)
    assert tiny_sd1_file.read_bytes() == before


GROWTH = """
import sys
from pathlib import Path

import torch
from torch import nn

from lorakit.models.weights.load import load_weights, without_weights


def resident_bytes():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
module = without_weights(lambda: nn.Linear(4096, 4096, bias=False))
before = resident_bytes()
load_weights(module, path, {"weight": "weight"}, torch.device("cpu"), dtype)
assert float(module(torch.ones(1, 4096, dtype=dtype)).float().abs().sum()) > 0
print(resident_bytes() - before)
"""
"""Prints by how much the memory of a process grows, but for pages of files, when it reads weights."""


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 0.0), ("float16", 0.5)])
def test_memory_grows_by_the_weights_in_the_new_format_only(tmp_path: Path, dtype: str, copies: float) -> None:
    """64 MiB of float32 take no memory as float32 and 32 MiB as float16, in a process with no memory to spare."""
    size = 64 * 2**20
    save_file({"weight": torch.randn(4096, 4096)}, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "x.safetensors"), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert abs(int(run.stdout) - copies * size) < 0.15 * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_number_format_is_the_one_asked_for(tiny_sd1: Path, tiny_sd1_file: Path, dtype: torch.dtype) -> None:
    """All parts are in the number format asked for, frozen, in evaluation mode, and rounded once."""
    model = stable_diffusion(tiny_sd1, dtype)
    for module in (model.denoiser, model.text_encoder.module, model.vae_encoder.module):
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(child.training for child in module.modules())
    stored = load_file(tiny_sd1_file)["model.diffusion_model.time_embed.0.weight"]
    assert torch.equal(model.denoiser.time_embedding.linear_1.weight, stored.to(dtype))


def test_old_checkpoints_are_read(tmp_path: Path) -> None:
    """The format of PyTorch before 1.6, which cannot be mapped, gives the same tensors."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).half()}
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    read = open_tensors(tmp_path / "x.ckpt")
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A checkpoint that is damaged behind its header is refused by name."""
    torch.save({"a": torch.randn(300)}, tmp_path / "x.ckpt")
    content = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"x\.ckpt is not a complete PyTorch checkpoint"):
        open_tensors(tmp_path / "x.ckpt")
