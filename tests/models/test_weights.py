"""Weights come straight from the file: mapped, without a second copy, in the number format asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.errors import ModelError
from lorakit.models.weights import load_weights, open_tensors, without_weights
from tests.models.building import CPU, stable_diffusion


def mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """Where in this process's memory a file is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = [line[0].split("-") for line in lines if line[-1] == str(file)]
    return [(int(start, 16), int(end, 16)) for start, end in places]


@pytest.mark.parametrize("form", ["tiny_file", "tiny_ckpt", "tiny_sd2_file", "tiny_sd2_ckpt"])
def test_parameters_are_views_of_the_file(request: pytest.FixtureRequest, form: str) -> None:
    """On the CPU, every parameter of every part lies in the mapped file: there is no second copy, even of thirds."""
    file = request.getfixturevalue(form)
    model = stable_diffusion(file)
    modules = [model.denoiser, model.text_encoder.module, model.image_encoder.module]
    ranges = mapped_ranges(file)
    assert ranges
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        assert any(start <= parameter.data_ptr() < end for start, end in ranges)


def test_training_leaves_the_file_alone(tiny_file: Path) -> None:
    """Writing to a mapped parameter changes the process's memory, never the file."""
    before = tiny_file.read_bytes()
    parameter = next(stable_diffusion(tiny_file).denoiser.parameters())
    parameter.add_(1)
    assert tiny_file.read_bytes() == before


def resident_bytes() -> int:
    """Memory of this process that is not pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 0.0), (torch.float16, 0.5)])
def test_memory_grows_by_the_weights_in_the_new_format_only(tmp_path: Path, dtype: torch.dtype, copies: float) -> None:
    """64 MiB of float32 take no memory as float32 and 32 MiB as float16."""
    size = 64 * 2**20
    save_file({"weight": torch.randn(4096, 4096)}, tmp_path / "x.safetensors")
    module = without_weights(lambda: nn.Linear(4096, 4096, bias=False))
    before = resident_bytes()
    load_weights(module, tmp_path / "x.safetensors", {"weight": "weight"}, CPU, dtype)
    assert float(module(torch.ones(1, 4096, dtype=dtype)).float().abs().sum()) > 0
    assert abs(resident_bytes() - before - copies * size) < 0.15 * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_number_format_is_the_one_asked_for(tiny_folder: Path, tiny_file: Path, dtype: torch.dtype) -> None:
    """All parts are in the number format asked for, frozen, in evaluation mode, and rounded once."""
    model = stable_diffusion(tiny_folder, dtype)
    for module in (model.denoiser, model.text_encoder.module, model.image_encoder.module):
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(child.training for child in module.modules())
    stored = load_file(tiny_file)["model.diffusion_model.time_embed.0.weight"]
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
    with pytest.raises(ModelError, match=r"x\.ckpt cannot be read"):
        open_tensors(tmp_path / "x.ckpt")
