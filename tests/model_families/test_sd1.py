"""The family sd1: what it recognises, refuses and builds, without torch until something is built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.builtin.model_families.sd1 import SD1Config, detect_model_family, register_model_families
from lorakit.checkpoints import CheckpointSummary, summarize

CPU = torch.device("cpu")


def test_the_family_is_registered() -> None:
    """The hook names the config class, and the class its family."""
    assert register_model_families() == [SD1Config]
    assert SD1Config.name == "sd1"


def test_sd1_is_recognised_in_every_form(tiny_sd1: Path, tiny_sd1_file: Path, tiny_sd1_ckpt: Path) -> None:
    """Folder, safetensors file and checkpoint are recognised."""
    assert [detect_model_family(summarize(path)).name for path in (tiny_sd1, tiny_sd1_file, tiny_sd1_ckpt)] == [
        "sd1"
    ] * 3


def without_projection(shapes: dict[str, tuple[int, ...]]) -> None:
    """Make every transformer start with a linear layer, as in SD 2.x."""
    shapes |= {name: shape[:2] for name, shape in shapes.items() if "proj_in.weight" in name}


def with_open_clip(shapes: dict[str, tuple[int, ...]]) -> None:
    """Put OpenCLIP's text encoder in the place of CLIP's."""
    for name in [name for name in shapes if name.startswith("cond_stage_model.")]:
        shapes[name.replace("cond_stage_model.transformer.", "cond_stage_model.model.")] = shapes.pop(name)


def with_nine_channels(shapes: dict[str, tuple[int, ...]]) -> None:
    """Make it an inpainting model."""
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (32, 9, 3, 3)


def with_label(shapes: dict[str, tuple[int, ...]]) -> None:
    """Condition the U-Net on more than text, as in SDXL."""
    shapes["model.diffusion_model.label_emb.0.0.weight"] = (128, 64)


def without_text(shapes: dict[str, tuple[int, ...]]) -> None:
    """Leave out the text encoder."""
    for name in [name for name in shapes if name.startswith("cond_stage_model.")]:
        del shapes[name]


def changed_file(file: Path, change: Callable[[dict[str, tuple[int, ...]]], None]) -> CheckpointSummary:
    """What a model's file would be with other tensors."""
    shapes = dict(summarize(file).tensors)
    change(shapes)
    return CheckpointSummary(file, "safetensors", shapes)


def changed_folder(folder: Path, change: dict[str, Any]) -> CheckpointSummary:
    """What a model's folder would be with other settings of the U-Net."""
    configs = summarize(folder).configs
    return CheckpointSummary(folder, "folder", configs={**configs, "unet": {**configs["unet"], **change}})


@pytest.mark.parametrize("change", [without_projection, with_open_clip, with_nine_channels, with_label, without_text])
def test_other_models_are_not_claimed(tiny_sd1_file: Path, change: Any) -> None:
    """What differs from SD 1.x in one thing that matters is left to other families."""
    assert detect_model_family(changed_file(tiny_sd1_file, change)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"use_linear_projection": True},
        {"in_channels": 9},
        {"addition_embed_type": "text_time"},
        {"time_cond_proj_dim": 256},
        {"_class_name": "UNet3DConditionModel"},
    ],
)
def test_other_folders_are_not_claimed(tiny_sd1: Path, change: dict[str, Any]) -> None:
    """The same for folders."""
    assert detect_model_family(changed_folder(tiny_sd1, change)) is None


def problems(**fields: Any) -> list[str]:
    """The problems of a config, as text."""
    return [str(problem) for problem in SD1Config(**fields).problems()]


def test_a_whole_model_has_no_problems(tiny_sd1: Path, tiny_sd1_file: Path) -> None:
    """Neither form of a whole model is complained about."""
    assert problems(path=str(tiny_sd1)) == problems(path=str(tiny_sd1_file)) == []


def test_a_file_without_a_vae_needs_one(tiny_sd1_file: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    """A model without a VAE is a problem before training, unless the config names one."""
    tensors = {name: tensor for name, tensor in load_file(tiny_sd1_file).items() if not name.startswith("first_stage")}
    save_file(tensors, tmp_path / "x.safetensors")
    assert len(found := problems(path=str(tmp_path / "x.safetensors"))) == 1
    assert found[0].startswith("vae: is missing, and ")
    assert "x.safetensors has no VAE" in found[0]
    assert problems(path=str(tmp_path / "x.safetensors"), vae=tiny_sd1) == []


def test_parts_that_do_not_fit_are_a_problem(tiny_sd1: Path, tmp_path: Path) -> None:
    """A text encoder of another width than the U-Net takes is named before training."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd1, copy)
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 48}))
    assert "the U-Net takes 32 channels of text, the text encoder gives 48" in problems(path=str(copy))[0]


def test_a_missing_vae_is_a_problem(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """A VAE that is not there is named before training."""
    assert "gone.pt does not exist" in problems(path=str(tiny_sd1_file), vae=tmp_path / "gone.pt")[0]


@pytest.mark.parametrize(("fields", "text"), [({"clip_skip": 0}, "clip_skip"), ({"clip_skip": 13}, "clip_skip")])
def test_values_out_of_range_are_refused(fields: dict[str, Any], text: str) -> None:
    """`clip_skip` counts the twelve layers of the text encoder."""
    with pytest.raises(ValueError, match=text):
        SD1Config(path="x", **fields)


@pytest.mark.parametrize(
    ("stated", "asked", "expected"),
    [
        ("epsilon", None, "epsilon"),
        ("v_prediction", None, "v_prediction"),
        ("v_prediction", "epsilon", "epsilon"),
        ("epsilon", "v_prediction", "v_prediction"),
    ],
)
def test_prediction_is_asked_stated_or_epsilon(
    tiny_sd1: Path, tmp_path: Path, stated: str, asked: Any, expected: str
) -> None:
    """The config wins over the model's folder, and the folder over the default."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd1, copy)
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": stated}))
    model = SD1Config(path=str(copy), prediction=asked).build(CPU, torch.float32)
    latents, noise, steps = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.tensor([500])
    assert torch.equal(model.noise.target(latents, noise, steps), noise) == (expected == "epsilon")


def test_options_reach_the_model(tiny_sd1_file: Path) -> None:
    """Chunks, number format and device are those asked for."""
    model = SD1Config(path=str(tiny_sd1_file), max_token_length=150).build(CPU, torch.bfloat16)
    tokens = model.text_encoder.tokenize(["a cat"])
    assert tokens["ids"].shape == (1, 2, 77)
    assert model.text_encoder.encode(tokens)["hidden_states"].dtype == torch.bfloat16


def run_python(code: str, **environment: str) -> str:
    """What code prints in a fresh process without network."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_checking_a_model_imports_no_torch(tiny_sd1: Path, tiny_sd1_file: Path) -> None:
    """Recognising and checking a model imports neither torch nor diffusers, transformers or the Hub's client."""
    code = (
        "import sys; from pathlib import Path\n"
        "from lorakit.builtin.model_families.sd1 import SD1Config, detect_model_family\n"
        "from lorakit.checkpoints import summarize\n"
        f"for path in {[str(tiny_sd1), str(tiny_sd1_file)]}:\n"
        "    assert detect_model_family(summarize(Path(path))).name == 'sd1'\n"
        "    assert not list(SD1Config(path=path).problems())\n"
        "print({'torch', 'diffusers', 'transformers', 'huggingface_hub', 'numpy'} & sys.modules.keys())"
    )
    assert run_python(code).strip() == "set()"


def test_a_hub_model_is_read_from_the_cache(tiny_sd1: Path, tmp_path: Path) -> None:
    """A model that was downloaded before trains offline under its Hub id, named by that id."""
    repo, commit = tmp_path / "models--some--model", "0" * 40
    shutil.copytree(tiny_sd1, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = (
        "import torch; from lorakit.builtin.model_families.sd1 import SD1Config, detect_model_family\n"
        "config = SD1Config(path='some/model'); assert not list(config.problems())\n"
        "model = config.build(torch.device('cpu'), torch.float32)\n"
        "tokens = model.text_encoder.tokenize(['a cat']); hidden = model.text_encoder.encode(tokens)\n"
        "out = model.predict(torch.ones(1, 4, 8, 8), torch.tensor([5]), hidden)\n"
        "print(model.metadata()['ss_sd_model_name'], out.double().sum().item())"
    )
    name, total = run_python(code, HF_HUB_CACHE=str(tmp_path)).split()
    model = SD1Config(path=str(tiny_sd1)).build(CPU, torch.float32)
    hidden = model.text_encoder.encode(model.text_encoder.tokenize(["a cat"]))
    expected = model.predict(torch.ones(1, 4, 8, 8), torch.tensor([5]), hidden).double().sum().item()
    assert name == "some/model"
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_captions_that_are_cut_off(tiny_sd1: Path) -> None:
    """They are counted with the longest, in tokens, without brackets where those weigh words; torch stays out."""
    words = {"a.png": "cat " * 75, "b.png": "cat " * 76, "c.png": "(cat:1.2) " * 200, "d.png": "", "e.png": "é" * 90}

    def said(weighted: bool = False, **settings: Any) -> list[str]:
        return [str(own) for own in SD1Config(path=str(tiny_sd1), **settings).warnings_of_captions(words, weighted)]

    shorter = "or write shorter captions"
    assert said(weighted=True) == [
        "max_token_length: 75 cuts off the end of 3 of 5 captions; the longest, of c.png, has 200 tokens"
        f" (set it to 150 or 225, {shorter})"
    ]
    assert said(weighted=True, max_token_length=225) == []
    assert said(weighted=True, max_token_length=150)[0].endswith(f"has 200 tokens (set it to 225, {shorter})")
    assert said(max_token_length=225)[0].endswith("(write shorter captions)")
    code = (
        "import sys; from lorakit.builtin.model_families.sd1 import SD1Config\n"
        "print(*SD1Config(path=sys.argv[1]).warnings_of_captions({'a': 'cat ' * 99}, True), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tiny_sd1)], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
    assert "99 tokens" in result.stdout
