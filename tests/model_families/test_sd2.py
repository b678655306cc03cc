"""The family sd2: what it recognises, refuses and builds, without torch until something is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.model_families.sd1 import detect_model_family as detect_sd1
from lorakit.builtin.model_families.sd2 import SD2Config, detect_model_family, register_model_families
from lorakit.checkpoints import CheckpointSummary, summarize
from lorakit.config.load import config_from_tables
from tests.model_families.test_sd1 import (
    changed_file,
    changed_folder,
    run_python,
    with_label,
    with_nine_channels,
    without_text,
)

CPU = torch.device("cpu")


def test_the_family_is_registered() -> None:
    """The hook names the config class, and the class its family."""
    assert register_model_families() == [SD2Config]
    assert SD2Config.name == "sd2"


def test_sd2_is_recognised_in_every_form(tiny_sd2: Path, tiny_sd2_file: Path, tiny_sd2_ckpt: Path) -> None:
    """Folder, safetensors file and checkpoint are recognised, by this family alone."""
    summaries = [summarize(path) for path in (tiny_sd2, tiny_sd2_file, tiny_sd2_ckpt)]
    assert [detect_model_family(summary).name for summary in summaries] == ["sd2"] * 3
    assert [detect_sd1(summary) for summary in summaries] == [None] * 3


def with_convolution(shapes: dict[str, tuple[int, ...]]) -> None:
    """Make every transformer start with a convolution, as in SD 1.x."""
    shapes |= {name: (*shape, 1, 1) for name, shape in shapes.items() if "proj_in.weight" in name}


def with_clip(shapes: dict[str, tuple[int, ...]]) -> None:
    """Put CLIP's text encoder in the place of OpenCLIP's."""
    for name in [name for name in shapes if name.startswith("cond_stage_model.")]:
        shapes[name.replace("cond_stage_model.model.", "cond_stage_model.transformer.")] = shapes.pop(name)


def with_two_encoders(shapes: dict[str, tuple[int, ...]]) -> None:
    """Add CLIP's text encoder, and put both where SDXL has them."""
    for name in [name for name in shapes if name.startswith("cond_stage_model.")]:
        shapes[name.replace("cond_stage_model.", "conditioner.embedders.1.")] = shapes.pop(name)
    shapes["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"] = (32,)


@pytest.mark.parametrize(
    "change", [with_convolution, with_clip, with_two_encoders, with_nine_channels, with_label, without_text]
)
def test_other_models_are_not_claimed(tiny_sd2_file: Path, change: Any) -> None:
    """What differs from SD 2.x in one thing that matters is left to other families."""
    assert detect_model_family(changed_file(tiny_sd2_file, change)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"use_linear_projection": False},
        {"in_channels": 9},
        {"in_channels": 5},
        {"addition_embed_type": "text_time"},
        {"class_embed_type": "projection"},
        {"num_class_embeds": 1000},
        {"_class_name": "UNet3DConditionModel"},
    ],
)
def test_other_folders_are_not_claimed(tiny_sd2: Path, change: dict[str, Any]) -> None:
    """The same for folders: SD 1.x, inpainting, depth, SDXL, unCLIP, upscaling, video."""
    assert detect_model_family(changed_folder(tiny_sd2, change)) is None


def test_a_folder_with_two_text_encoders_is_not_claimed(tiny_sd2: Path) -> None:
    """Nor is one with a second text encoder, as SDXL has it."""
    summary = summarize(tiny_sd2)
    configs = {**summary.configs, "text_encoder_2": summary.configs["text_encoder"]}
    assert detect_model_family(CheckpointSummary(tiny_sd2, "folder", configs=configs)) is None


def test_models_of_the_other_version_are_a_problem(
    tiny_sd2: Path, tiny_sd2_file: Path, tiny_sd1: Path, tiny_sd1_file: Path
) -> None:
    """A family that is set and does not fit the model is named before training, with what the model is."""
    for path in (tiny_sd2, tiny_sd2_file):
        (problem,) = SD1Config(path=str(path)).problems()
        assert f"{path} is a Stable Diffusion 2.x model, not a Stable Diffusion 1.x model" in str(problem)
        assert not list(SD2Config(path=str(path)).problems())
    for path in (tiny_sd1, tiny_sd1_file):
        (problem,) = SD2Config(path=str(path)).problems()
        assert f"{path} is a Stable Diffusion 1.x model, not a Stable Diffusion 2.x model" in str(problem)


def test_a_path_that_leads_nowhere_is_a_problem() -> None:
    """A missing file is one problem, and no warning on top of it."""
    config = SD2Config(path="gone.safetensors")
    assert ["gone.safetensors does not exist" in str(problem) for problem in config.problems()] == [True]
    assert not list(config.warnings())


@pytest.mark.parametrize("clip_skip", [0, 24])
def test_values_out_of_range_are_refused(clip_skip: int) -> None:
    """`clip_skip` counts the 23 layers of the text encoder that are used."""
    with pytest.raises(ValueError, match="clip_skip"):
        SD2Config(path="x", clip_skip=clip_skip)


@pytest.mark.parametrize(
    ("form", "asked", "expected"),
    [
        ("tiny_sd2", None, "v_prediction"),
        ("tiny_sd2", "epsilon", "epsilon"),
        ("tiny_sd2_file", None, "epsilon"),
        ("tiny_sd2_file", "v_prediction", "v_prediction"),
    ],
)
def test_prediction_is_asked_stated_or_epsilon(
    request: pytest.FixtureRequest, form: str, asked: Any, expected: str
) -> None:
    """The config wins over the folder; a file says nothing, and the noise is assumed. LoRA files say which."""
    model = SD2Config(path=str(request.getfixturevalue(form)), prediction=asked).build(CPU, torch.float32)
    latents, noise, steps = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.tensor([500])
    assert torch.equal(model.noise.target(latents, noise, steps), noise) == (expected == "epsilon")
    kind = "768-v" if expected == "v_prediction" else "512"
    assert model.metadata()["modelspec.architecture"] == f"stable-diffusion-v2-{kind}/lora"


@pytest.mark.parametrize(
    ("form", "options", "count"),
    [
        ("tiny_sd2_file", {}, 1),
        ("tiny_sd2_file", {"prediction": "epsilon"}, 0),
        ("tiny_sd2_file", {"prediction": "v_prediction"}, 0),
        ("tiny_sd2", {}, 0),
    ],
)
def test_a_file_without_a_prediction_is_warned_of(
    request: pytest.FixtureRequest, photographs: Path, tmp_path: Path, form: str, options: dict[str, str], count: int
) -> None:
    """That the noise is assumed is said where it may be wrong, and nowhere else."""
    tables = {
        "model": {"path": str(request.getfixturevalue(form)), **options},
        "data": {"image_dir": str(photographs), "resolution": 64},
        "output": {"dir": str(tmp_path / "out")},
    }
    warnings = [str(warning) for warning in config_from_tables(tables, tmp_path).warnings()]
    assert len(warnings) == count
    assert all(text.startswith("model.prediction: is absent and tiny-sd2.safetensors") for text in warnings)


def test_options_reach_the_model(tiny_sd2_file: Path) -> None:
    """Chunks, padding, number format and device are those asked for."""
    model = SD2Config(path=str(tiny_sd2_file), max_token_length=150).build(CPU, torch.bfloat16)
    tokens = model.text_encoder.tokenize(["a cat"])
    assert tokens["ids"][0, :, -1].tolist() == [0, 0]
    assert model.text_encoder.encode(tokens)["hidden_states"].dtype == torch.bfloat16


def test_checking_a_model_imports_no_torch(tiny_sd2: Path, tiny_sd2_file: Path) -> None:
    """Recognising and checking a model imports neither torch nor diffusers, transformers or the Hub's client."""
    code = (
        "import sys; from pathlib import Path\n"
        "from lorakit.builtin.model_families.sd2 import SD2Config, detect_model_family\n"
        "from lorakit.checkpoints import summarize\n"
        f"for path in {[str(tiny_sd2), str(tiny_sd2_file)]}:\n"
        "    assert detect_model_family(summarize(Path(path))).name == 'sd2'\n"
        "    config = SD2Config(path=path); assert not list(config.problems()); list(config.warnings())\n"
        "print({'torch', 'diffusers', 'transformers', 'huggingface_hub', 'numpy'} & sys.modules.keys())"
    )
    assert run_python(code).strip() == "set()"
