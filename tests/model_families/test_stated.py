"""What models say of themselves counts; a config that contradicts it is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.model_families.sd2 import SD2Config
from lorakit.config.load import config_from_tables
from lorakit.training.prepare import prepare
from lorakit.training.summary import summarize_run

V_HEADER = {"modelspec.prediction_type": "v"}
KEYS = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}


def copy_of(file: Path, folder: Path, keys: Mapping[str, torch.Tensor], header: dict[str, str] | None = None) -> str:
    """A model with further tensors and another header."""
    save_file({**load_file(file), **keys}, folder / "stated.safetensors", metadata=header)
    return str(folder / "stated.safetensors")


def warnings(config: SD1Config | SD2Config) -> list[str]:
    """The warnings of a config, as text."""
    return [str(warning) for warning in config.warnings()]


def test_files_go_by_their_own_word(tiny_sd2_file: Path, tmp_path: Path) -> None:
    """A file that says that it predicts velocity is trained so, and of it nothing is asked."""
    for keys, header in ((KEYS, None), ({}, V_HEADER)):
        config = SD2Config(path=copy_of(tiny_sd2_file, tmp_path, keys, header))
        assert warnings(config) == list(config.problems()) == []
        assert config.build(torch.device("cpu"), torch.float32).noise.prediction == "v_prediction"
    path = copy_of(tiny_sd2_file, tmp_path, {})
    assert "does not say it, so epsilon is assumed" in warnings(SD2Config(path=path))[0]
    (tmp_path / "stated.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert warnings(SD2Config(path=path)) == []
    assert SD2Config(path=path).build(torch.device("cpu"), torch.float32).noise.prediction == "v_prediction"


def test_files_of_1x_go_by_their_own_word(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """The same for 1.x, which mostly predicts noise."""
    config = SD1Config(path=copy_of(tiny_sd1_file, tmp_path, KEYS))
    assert config.build(torch.device("cpu"), torch.float32).noise.prediction == "v_prediction"


def test_a_config_that_contradicts_is_told(tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path) -> None:
    """The config wins over files and folders, with a warning that names who says otherwise."""
    path = copy_of(tiny_sd1_file, tmp_path, {}, V_HEADER)
    assert warnings(SD1Config(path=path, prediction="v_prediction")) == []
    (warning,) = warnings(SD1Config(path=path, prediction="epsilon"))
    said = "says v_prediction in its header (modelspec.prediction_type)"
    assert warning.startswith(f'prediction: is "epsilon", but the model {said}')
    (warning,) = warnings(SD1Config(path=str(tiny_sd1), prediction="v_prediction"))
    assert 'is "v_prediction", but the model says epsilon in scheduler_config.json' in warning


@pytest.mark.parametrize("form", ["file", "folder"])
def test_zero_terminal_snr_is_the_models(
    tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path, photographs: Path, form: str
) -> None:
    """A model trained with zero terminal SNR is trained on so; a config that says otherwise gets a warning."""
    if form == "file":
        path = copy_of(tiny_sd1_file, tmp_path, KEYS)
    else:
        path = str(shutil.copytree(tiny_sd1, tmp_path / "model"))
        scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    tables: dict[str, Any] = {
        "model": {"path": path},
        "data": {"image_dir": str(photographs), "resolution": 64},
        "output": {"dir": str(tmp_path / "out")},
    }
    config = config_from_tables(tables, tmp_path)
    assert config.loss.zero_terminal_snr
    assert list(config.warnings()) == []
    assert "v-prediction, zero terminal SNR" in " ".join(" ".join(summarize_run(prepare(config))).split())
    tables["loss"] = {"zero_terminal_snr": False}
    config = config_from_tables(tables, tmp_path)
    assert not config.loss.zero_terminal_snr
    (warning,) = map(str, config.warnings())
    assert warning.startswith("model.path: ")
    assert "was trained with zero terminal SNR" in warning
