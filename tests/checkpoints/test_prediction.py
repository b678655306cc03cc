"""What models say of their prediction: by keys, in headers, beside the file, in a folder's scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorakit.checkpoints import CheckpointSummary, StatedPrediction, stated_prediction, summarize

SCHEDULER = "scheduler_config.json"
EMPTY = torch.empty(0)
CONFIG = """\
# Stable Diffusion 2.1, 768 pixels
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"  # the velocity
    linear_start: 0.00085
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        parameterization: "eps"
"""


def stated(
    folder: Path, keys: tuple[str, ...] = (), header: dict[str, str] | None = None, yaml: str | None = None
) -> StatedPrediction:
    """What a file with these empty tensors and this header says, with a config beside it."""
    path = folder / "model.safetensors"
    save_file({"x": torch.ones(1), **dict.fromkeys(keys, EMPTY)}, path, metadata=header)
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml, encoding="utf-8")
    return stated_prediction(summarize(path))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "v_prediction"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.predict_key": "v"}, "v_prediction"),
        ({"modelspec.predict_key": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({"modelspec.prediction_type": "flow"}, None),
        ({"format": "pt"}, None),
        (None, None),
    ],
)
def test_headers(tmp_path: Path, header: dict[str, str] | None, expected: str | None) -> None:
    """The keys of the model metadata standard count in the spellings that tools write."""
    found = stated(tmp_path, header=header)
    assert (found.prediction, found.snr_source) == (expected, "")
    assert not expected or found.source.startswith("its header (modelspec.")


def test_empty_tensors(tmp_path: Path) -> None:
    """`v_pred` says velocity, whatever the header says; `ztsnr` says how the noise schedule ends."""
    found = stated(tmp_path, ("v_pred", "ztsnr"), {"modelspec.prediction_type": "epsilon"})
    assert (found.prediction, found.source, found.snr_source) == ("v_prediction", "its key v_pred", "its key ztsnr")
    assert stated(tmp_path, ("v_pred",)).snr_source == ""
    assert stated(tmp_path, ("ztsnr",)).prediction is None
    torch.save({"state_dict": {"x": torch.ones(1), "v_pred": EMPTY}}, tmp_path / "model.ckpt")
    assert stated_prediction(summarize(tmp_path / "model.ckpt")).prediction == "v_prediction"


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        (CONFIG, "v_prediction"),
        (CONFIG.replace("\n", "\r\n"), "v_prediction"),
        (f"\ufeff{CONFIG}", "v_prediction"),
        (CONFIG.replace('"v"', "v"), "v_prediction"),
        (CONFIG.replace('"v"', "'v'"), "v_prediction"),
        (CONFIG.replace('    parameterization: "v"  # the velocity\n', ""), "epsilon"),
        (CONFIG.replace('"v"  # the velocity', '"eps"'), "epsilon"),
        ('model:\n    params:\n        parameterization: "v"\n', "v_prediction"),
        ('{model: {params: {parameterization: "v"}}}', "v_prediction"),
        ("{model: {params: {parameterization: v}}}  # velocity", "v_prediction"),
        ("{'model': {'params': {'parameterization': 'v'}}}", "v_prediction"),
        ('{"model":{"params":{"parameterization":"v"}}}', "v_prediction"),
        ("model:\n  params: {linear_start: 0.1, # where it starts\n    parameterization: v}\n", "v_prediction"),
        ('# a model\n---\n"model":\n  "params":\n    "parameterization": "v"\n', "v_prediction"),
        ("model:\n  params:\n    parameterization: >-\n      v\n", "v_prediction"),
        ("model:\n  params: &p\n    parameterization: v\nother: *p\n", "v_prediction"),
        ("{model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {linear_start: 0.1}}}", "epsilon"),
        ("{model: {params: {unet_config: {params: {parameterization: v}}}}}", None),
        ("{model: [{params: {parameterization: v}}]}", None),
        ("{model: {params: {parameterization: [v]}}}", None),
        ("{model: {params: {parameterization: v", None),
        ("model:\n\tparams: x\n", None),
        ("&a [*a, *a]", None),
        ("a: &a {b: c}\nmodel: !!python/object/apply:os.system {params: {<<: [*a, *a]}}\n", None),
        ('other:\n  params:\n    parameterization: "v"\n', None),
        ('parameterization: "v"\n', None),
        ("trigger: cat\n", None),
        ("", None),
        ("[" * 5000, None),
        ("a: !!python/object/apply:os.system ['true']\n", None),
    ],
)
def test_configs_beside_the_file(tmp_path: Path, yaml: str, expected: str | None) -> None:
    """A config of the original implementation counts; other files of that name say nothing."""
    found = stated(tmp_path, yaml=yaml)
    assert found.prediction == expected
    assert found.source == ("model.yaml" if expected else "")


def test_configs_that_cannot_be_read(tmp_path: Path) -> None:
    """What is no text, too long, or no file is passed over; `.yml` counts as well; the header comes first."""
    assert stated(tmp_path, yaml=CONFIG + "#" * 2**16).prediction is None
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00")
    assert stated(tmp_path).prediction is None
    (tmp_path / "model.yaml").unlink()
    (tmp_path / "model.yaml").mkdir()
    assert stated(tmp_path).prediction is None
    (tmp_path / "model.yml").write_text(CONFIG)
    assert stated(tmp_path).source == "model.yml"
    assert stated(tmp_path, header={"modelspec.prediction_type": "epsilon"}).prediction == "epsilon"


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            ("v_prediction", "scheduler_config.json"),
        ),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, ("epsilon", "")),
        ({"prediction_type": ["v"], "rescale_betas_zero_snr": "x"}, (None, "")),
        ({}, (None, "")),
    ],
)
def test_schedulers(tmp_path: Path, scheduler: dict[str, Any], expected: tuple[str | None, str]) -> None:
    """A folder's scheduler says both."""
    configs = {"unet": {}, "scheduler": json.loads(json.dumps(scheduler))}
    found = stated_prediction(CheckpointSummary(tmp_path, "folder", configs=configs))
    assert (found.prediction, found.snr_source) == expected
