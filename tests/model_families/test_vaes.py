"""A VAE given by `model.vae`: what it may be, where its faults are told, and when it is one for another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.model_families.sdxl import SDXLConfig
from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError
from lorakit.testing.models import TINY_SD1, make_folder, make_tiny_sdxl, to_single_file


def told(path: Path, **fields: Any) -> tuple[list[str], list[str]]:
    """The problems and the warnings of a config, as text."""
    config = SD1Config(path=str(path), **fields)
    return [str(problem) for problem in config.problems()], [str(warning) for warning in config.warnings()]


def with_factor(vae: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a VAE's folder with other settings."""
    shutil.copytree(vae, folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


def vae_file(vae: Path, path: Path, header: dict[str, str] | None = None) -> Path:
    """A VAE's folder as one file."""
    save_file(load_file(vae / "diffusion_pytorch_model.safetensors"), path, metadata=header)
    return path


def test_an_sdxl_vae_is_noticed_in_a_folder(tiny_sd1: Path, tmp_path: Path) -> None:
    """Its scaling factor tells, in a folder of its own and in the model's."""
    vae = with_factor(tiny_sd1 / "vae", tmp_path / "vae", scaling_factor=0.13025)
    assert told(tiny_sd1, vae=vae)[0] == []
    (warning,) = told(tiny_sd1, vae=vae)[1]
    assert warning.startswith(f"vae: {vae} has a VAE that is not for Stable Diffusion 1.x: its scaling_factor is ")
    assert "0.13025, which is that of Stable Diffusion XL" in warning
    shutil.copytree(tiny_sd1, tmp_path / "model", ignore=shutil.ignore_patterns("vae"))
    shutil.copytree(vae, tmp_path / "model" / "vae")
    (warning,) = told(tmp_path / "model")[1]
    assert warning.startswith("path: ")
    assert told(tiny_sd1, vae=tiny_sd1) == told(tiny_sd1) == ([], [])


@pytest.mark.parametrize(
    ("header", "count"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, 1),
        ({"modelspec.title": "SDXL VAE fp16 fix"}, 1),
        ({"modelspec.architecture": "stable-diffusion-v1/vae"}, 0),
        ({"format": "pt"}, 0),
        (None, 0),
    ],
)
def test_an_sdxl_vae_is_noticed_in_a_file(
    tiny_sd1: Path, tmp_path: Path, header: dict[str, str] | None, count: int
) -> None:
    """Its header tells, if it has one."""
    problems, warnings = told(tiny_sd1, vae=vae_file(tiny_sd1 / "vae", tmp_path / "vae.safetensors", header))
    assert (problems, len(warnings)) == ([], count)
    assert all(warning.startswith("vae: ") and "its header has modelspec." in warning for warning in warnings)


def test_a_whole_sdxl_model_is_noticed(tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path) -> None:
    """So does what else is in the file."""
    xl = to_single_file(make_tiny_sdxl(tmp_path / "xl"), tmp_path / "xl.safetensors")
    problems, (warning,) = told(tiny_sd1, vae=xl)
    assert problems == []
    assert "it is that of a Stable Diffusion XL model" in warning
    assert not list(SDXLConfig(path=str(xl), vae=str(xl)).warnings())
    (other,) = SDXLConfig(path=str(xl), vae=str(tiny_sd1_file)).warnings()
    assert "not for Stable Diffusion XL: it is that of a Stable Diffusion 1.x model" in str(other)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"latent_channels": 16}, "makes latents of 16 channels; the U-Net takes 4"),
        ({"block_out_channels": [32, 32, 64]}, "makes latents 4 times smaller than images; the U-Net takes 8"),
    ],
)
def test_vaes_of_other_shapes(tiny_sd1: Path, tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    """Latents of another shape are refused, at `model.vae`, in a folder and in a file."""
    levels = len(settings.get("block_out_channels", [32] * 4))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    folder = make_folder(tmp_path / "model", {**TINY_SD1, "vae": {**TINY_SD1["vae"], **blocks, **settings}})
    for vae in (folder / "vae", vae_file(folder / "vae", tmp_path / "vae.safetensors")):
        (problem,) = told(tiny_sd1, vae=vae)[0]
        assert problem.startswith("vae: ")
        assert text in problem
    (problem,) = told(folder)[0]
    assert problem.startswith("path: ")


def test_other_kinds_of_vae(tiny_sd1: Path, tmp_path: Path) -> None:
    """One of another class is refused by its name."""
    vae = with_factor(tiny_sd1 / "vae", tmp_path / "vae", _class_name="AutoencoderTiny")
    (problem,) = told(tiny_sd1, vae=vae)[0]
    assert problem.startswith("vae: ")
    assert "is of the class AutoencoderTiny" in problem


def hypernetwork(width: int) -> tuple[dict[str, torch.Tensor], ...]:
    """The layers for keys and for values in a hypernetwork of A1111."""
    return tuple(torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.Linear(4, width)).state_dict() for _ in "kv")


EMBEDDING = torch.ones(2, 768)
OTHERS: dict[str, tuple[Any, str]] = {
    "hypernetwork": ({768: hypernetwork(768), 320: hypernetwork(320), "step": 9, "name": "x"}, "a hypernetwork"),
    "embedding": (
        {"string_to_token": {"*": 265}, "string_to_param": {"*": EMBEDDING}},
        "a textual-inversion embedding",
    ),
    "embedding of old": (
        {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(EMBEDDING)}),
        },
        "a textual-inversion embedding",
    ),
    "embedding of diffusers": ({"<cat>": EMBEDDING[0]}, "a textual-inversion embedding"),
    "tiny VAE": (
        {"0.weight": torch.ones(4, 3, 3, 3), "1.conv.0.weight": torch.ones(4, 4, 3, 3)},
        "a tiny VAE for previews (TAESD)",
    ),
    "text encoder": ({"encoder.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}, "a text encoder"),
    "T5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)}, "a text encoder (T5) alone"),
    "LoRA": ({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, "a LoRA"),
    "upscaler": ({"params_ema": {"body.0.rdb1.conv1.weight": torch.ones(2, 2)}}, "an image upscaler"),
}
"""What users give in the place of a VAE, a model or a LoRA, and what it is."""


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("is_archive", [True, False], ids=["zip", "legacy"])
def test_other_files_are_called_what_they_are(tiny_sd1: Path, tmp_path: Path, kind: str, is_archive: bool) -> None:
    """As VAE, model and LoRA alike, at the key that names the file."""
    content, title = OTHERS[kind]
    torch.save(content, tmp_path / "given.pt", _use_new_zipfile_serialization=is_archive)
    given = str(tmp_path / "given.pt")
    model = {"path": str(tiny_sd1)}
    tables: dict[str, Any] = {
        "data": {"image_dir": str(tiny_sd1), "resolution": 64},
        "model": model,
        "output": {"dir": "out"},
    }
    (problem,) = problems_of({**tables, "model": {**model, "vae": given}}, tmp_path)
    assert problem.startswith(f"model.vae: {given} holds no VAE; it is {title}")
    (problem,) = problems_of({**tables, "model": {"path": given}}, tmp_path)
    assert problem.startswith(f"model.path: {given} is {title}")
    if kind != "LoRA":
        (problem,) = problems_of({**tables, "network": {"weights": given}}, tmp_path)
        assert problem.startswith(f"network.weights: {given} is {title}")
        assert "base model" not in problem
        (problem,) = problems_of({**tables, "model": {**model, "base_weights": [given]}}, tmp_path)
        assert problem.startswith(f"model.base_weights[0]: {given} is {title}")


def problems_of(tables: dict[str, Any], folder: Path) -> list[str]:
    """What is wrong with a config, as text."""
    with pytest.raises(ConfigError) as caught:
        config_from_tables(tables, folder)
    return [str(problem) for problem in caught.value.problems]


def test_tiny_vaes_of_diffusers(tiny_sd1: Path, tmp_path: Path) -> None:
    """One that diffusers has saved is named, as a folder and as the file in it."""
    from diffusers import AutoencoderTiny

    sizes = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**sizes).save_pretrained(tmp_path / "tiny")
    (problem,) = told(tiny_sd1, vae=tmp_path / "tiny")[0]
    assert "is of the class AutoencoderTiny" in problem
    (problem,) = told(tiny_sd1, vae=tmp_path / "tiny" / "diffusion_pytorch_model.safetensors")[0]
    assert problem.endswith("holds no VAE; it is a tiny VAE for previews (TAESD)")


def test_damaged_vaes_are_not_called_something_else(tiny_sd1: Path, tmp_path: Path) -> None:
    """A VAE that lacks tensors is one still."""
    tensors = load_file(tiny_sd1 / "vae" / "diffusion_pytorch_model.safetensors")
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, tmp_path / "vae.safetensors")
    (problem,) = told(tiny_sd1, vae=tmp_path / "vae.safetensors")[0]
    assert "the VAE in " in problem
    assert "lacks encoder.conv_in.weight" in problem


def test_what_stands_for_a_vae(tiny_sd1: Path, tmp_path: Path, photographs: Path) -> None:
    """In a config, paths are relative to it, and a Hub id stays one; what is neither is told at its key."""
    shutil.copytree(tiny_sd1 / "vae", tmp_path / "my_vae")
    vae_file(tiny_sd1 / "vae", tmp_path / "vae.safetensors")
    tables: dict[str, Any] = {
        "model": {"path": str(tiny_sd1)},
        "data": {"image_dir": str(photographs), "resolution": 64},
        "output": {"dir": str(tmp_path / "out")},
    }
    for vae in ("my_vae", "vae.safetensors"):
        config = config_from_tables({**tables, "model": {**tables["model"], "vae": vae}}, tmp_path)
        assert getattr(config.model, "vae") == str(tmp_path / vae)  # noqa: B009 - it is a field of this family
    for vae, text in {
        "gone.safetensors": f"{tmp_path / 'gone.safetensors'} does not exist; give a .safetensors",
        "nobody/no-vae": "nobody/no-vae was not found: there is no ",
    }.items():
        with pytest.raises(ConfigError) as caught:
            config_from_tables({**tables, "model": {**tables["model"], "vae": vae}}, tmp_path)
        (problem,) = caught.value.problems
        assert problem.key == "model.vae"
        assert text in problem.message
