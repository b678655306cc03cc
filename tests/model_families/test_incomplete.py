"""Half a model: told before training, with what is missing, whichever tensor it is and however the model is stored."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.checkpoints import CheckpointSummary, summarize
from lorakit.errors import ModelError
from lorakit.models.families.sd.checkpoint import SDCheckpoint


def problems(path: Path, **fields: str) -> list[str]:
    """The problems of a config, as text."""
    return [str(problem) for problem in SD1Config(path=str(path), **fields).problems()]


def without(file: Path, path: Path, is_lost: Callable[[str], bool]) -> Path:
    """A copy of a model's file without some of its tensors."""
    kept = {name: tensor for name, tensor in load_file(file).items() if not is_lost(name)}
    save_file(kept, path) if path.suffix == ".safetensors" else torch.save({"state_dict": kept}, path)
    return path


@pytest.mark.parametrize(
    ("lost", "missing"),
    [
        ("model.diffusion_model.output_blocks.5.0.in_layers.2.weight", "U-Net in {} lacks output_blocks.5.0.in_"),
        ("model.diffusion_model.output_blocks.", "U-Net in {} lacks output_blocks."),
        ("model.diffusion_model.middle_block.", "U-Net in {} lacks middle_block."),
        ("model.diffusion_model.input_blocks.4.", "U-Net in {} lacks input_blocks.4."),
        ("model.diffusion_model.input_blocks.2.", "U-Net in {} lacks input_blocks.2."),
        ("model.diffusion_model.time_embed.", "U-Net in {} lacks time_embed.0.weight"),
        ("model.diffusion_model.out.", "U-Net in {} lacks out.2.weight"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.", "text encoder in {} lacks encoder.layers.1."),
        ("cond_stage_model.transformer.text_model.final_layer_norm.", "text encoder in {} lacks final_layer_norm."),
        ("first_stage_model.encoder.down.3.", "VAE in {} lacks encoder.down.3."),
        ("first_stage_model.encoder.down.0.block.0.conv1.", "VAE in {} lacks encoder.down.0.block.0.conv1."),
        ("first_stage_model.decoder.up.", "VAE in {} lacks decoder.up."),
        ("first_stage_model.encoder.mid.attn_1.q.weight", "VAE in {} lacks encoder.mid.attn_1.q.weight"),
        ("first_stage_model.quant_conv.", "VAE in {} lacks quant_conv.weight"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_that_lack_tensors(tiny_sd1_file: Path, tmp_path: Path, lost: str, missing: str, suffix: str) -> None:
    """The first tensors that are missing are named, at `model.path`."""
    path = without(tiny_sd1_file, tmp_path / f"half{suffix}", lambda name: name.startswith(lost))
    (problem,) = problems(path)
    assert problem.startswith("path: the ")
    assert missing.format(path) in problem
    assert "the file is incomplete" in problem


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_every_tensor_counts(tiny_sd1_file: Path, tiny_sd2_file: Path, family: str) -> None:
    """Of U-Net, VAE and text encoder none can be left out, but for the copies and leftovers that nobody reads."""
    file = tiny_sd1_file if family == "sd1" else tiny_sd2_file
    summary = summarize(file)
    unread = ("position_ids", "text_projection", "logit_scale", "attn_mask", "resblocks.3.")
    for name in summary.tensors:
        if any(part in name for part in unread):
            continue
        shapes = {other: shape for other, shape in summary.tensors.items() if other != name}
        assert _is_refused(file, shapes), name


def _is_refused(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    model = SDCheckpoint(file)
    # The summary is remembered; here it is put in by hand, which takes less time than a file for each tensor.
    object.__setattr__(model, "summary", CheckpointSummary(file, "safetensors", shapes))
    try:
        model.check()
        model.check_vae()
    except ModelError as error:
        return "lacks" in str(error) or "has no" in str(error) or "has tensors that none" in str(error)
    return False


def test_tensors_of_other_shapes(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """A tensor of another shape than the others ask for is named, with both shapes."""
    tensors = load_file(tiny_sd1_file)
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file({**tensors, name: torch.zeros(64, 32, 3, 3)}, tmp_path / "odd.safetensors")
    (problem,) = problems(tmp_path / "odd.safetensors")
    assert "middle_block.0.in_layers.2.weight is (64, 32, 3, 3), not (64, 64, 3, 3)" in problem


@pytest.mark.parametrize(
    ("part", "file", "lost", "missing"),
    [
        ("unet", "diffusion_pytorch_model", "mid_block.", "U-Net in {} lacks mid_block."),
        ("vae", "diffusion_pytorch_model", "decoder.", "VAE in {} lacks decoder."),
        ("text_encoder", "model", "text_model.encoder.layers.2.", "text encoder in {} lacks encoder.layers.2."),
    ],
)
def test_folders_that_lack_tensors(
    tiny_sd1: Path, tmp_path: Path, part: str, file: str, lost: str, missing: str
) -> None:
    """The same for the parts of a folder."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    weights = folder / part / f"{file}.safetensors"
    without(weights, weights, lambda name: name.startswith(lost))
    (problem,) = problems(folder)
    assert missing.format(weights) in problem


def test_settings_of_another_kind(tiny_sd1: Path, tmp_path: Path) -> None:
    """Settings that no Stable Diffusion has are told before training."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "resnet_time_scale_shift": "scale_shift"}))
    (problem,) = problems(folder)
    assert "resnet_time_scale_shift is 'scale_shift', which it is in no Stable Diffusion" in problem


def test_a_model_without_a_vae(tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path) -> None:
    """Its key is named, for files and folders; with it set, the model is whole."""
    file = without(tiny_sd1_file, tmp_path / "x.safetensors", lambda name: name.startswith("first_stage_model."))
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model", ignore=shutil.ignore_patterns("vae")))
    for path in (file, folder):
        (problem,) = problems(path)
        assert problem.startswith(f"vae: is missing, and {path} has no VAE (give a file, a folder or a Hub id")
        assert problems(path, vae=str(tiny_sd1 / "vae")) == problems(path, vae=str(tiny_sd1_file)) == []


def test_faults_of_a_vae_of_its_own(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """Whatever is wrong with it is told at `model.vae`."""
    half = without(tiny_sd1_file, tmp_path / "half.safetensors", lambda name: ".decoder.mid." in name)
    (tmp_path / "empty").mkdir()
    for vae, text in {half: "lacks decoder.mid.", tmp_path / "empty": "no config.json"}.items():
        (problem,) = problems(tiny_sd1_file, vae=str(vae))
        assert problem.startswith("vae: ")
        assert text in problem


def test_checking_needs_no_torch(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """Half a model is told without torch."""
    half = without(tiny_sd1_file, tmp_path / "half.safetensors", lambda name: ".middle_block." in name)
    code = (
        "import sys; from lorakit.builtin.model_families.sd1 import SD1Config\n"
        f"assert 'lacks middle_block' in str(*SD1Config(path={str(half)!r}).problems())\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
