"""`training.mixed_precision = "auto"`: it is chosen once, and all that reads it gets what was chosen."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import lorakit
from lorakit.config.train_config import TrainingSection
from lorakit.training.prepare import prepare
from lorakit.training.runtime import precision
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.precision import Precision, common_precision, with_precision
from lorakit.training.setup import build_run, init_distributed
from tests.training.conftest import MakeConfig

CPU = torch.device("cpu")


@pytest.fixture
def chooses_bf16(monkeypatch: pytest.MonkeyPatch) -> Precision:
    """What `"auto"` chooses on this CPU, as if it were a GPU."""
    own, chosen = precision.precision_of, Precision("bf16", "compute capability 8.0")

    def choose(training: TrainingSection, _: torch.device) -> Precision:
        return chosen if training.mixed_precision == "auto" else own(training, CPU)

    monkeypatch.setattr(precision, "precision_of", choose)
    return chosen


def saved_precision(config: object, path: Path) -> tuple[str, str]:
    """What the config beside a LoRA file says, and the file's metadata."""
    (written,) = path.parent.glob("*.toml")
    with safe_open(path, "pt") as file:
        return tomllib.loads(written.read_text())["training"]["mixed_precision"], file.metadata()["ss_mixed_precision"]


def test_it_is_the_default(make_config: MakeConfig) -> None:
    """Without the key, precision is chosen; on a CPU it is float32, and the files say that."""
    config = make_config(training={"max_steps": 1}, network={"parts": ["unet"]})
    assert config.training.mixed_precision == "auto"
    assert saved_precision(config, lorakit.train(config)) == ("no", "no")


@pytest.mark.usefixtures("chooses_bf16")
def test_what_is_chosen_is_used(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Model, files and log have what was chosen; the log also says why, and what does not suit it."""
    caplog.set_level(logging.INFO, "lorakit")
    config = make_config(training={"max_steps": 1, "tf32": True}, network={"parts": ["unet"]})
    assert not [warning for warning in config.warnings() if warning.key == "training.tf32"]
    assert saved_precision(config, lorakit.train(config)) == ("bf16", "bf16")
    assert "CPU, bf16 (auto: compute capability 8.0)" in caplog.text
    assert caplog.text.count("training.tf32: has almost no effect with mixed_precision 'bf16'") == 1
    prepared, processes = init_distributed(prepare(config))
    run = build_run(prepared, processes)
    assert run.config.training.mixed_precision == "bf16"
    assert run.model.denoiser.conv_in.weight.dtype == torch.bfloat16
    assert not run.scaler.is_enabled()


def test_fp16_scales_the_loss(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fp16 is chosen, gradients are scaled as where the config asks for it."""
    monkeypatch.setattr(precision, "precision_of", lambda *_: Precision("fp16", "compute capability 7.5, below 8.0"))
    run = build_run(prepare(make_config(network={"parts": ["unet"]})), Distributed(CPU))
    assert run.scaler.is_enabled()
    assert run.model.denoiser.conv_in.weight.dtype == torch.float16


class Beside(Distributed):
    """One of two processes, whose sums have another part."""

    others: tuple[float, ...] = ()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum with the other process's part."""
        return tensor + torch.tensor(self.others)


@pytest.mark.parametrize(
    ("others", "expected"),
    [((0.0, 0.0, 1.0), "bf16"), ((0.0, 1.0, 0.0), "fp16"), ((1.0, 0.0, 0.0), "no")],
)
def test_processes_choose_alike(
    others: tuple[float, ...], expected: str, chooses_bf16: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different GPUs compute in what all of them have; what the config names is not negotiated."""
    monkeypatch.setattr(Beside, "others", others)
    found = common_precision(TrainingSection(), Beside(CPU, 0, 2))
    assert found.value == expected
    assert (found == chooses_bf16) == (expected == "bf16")
    assert common_precision(TrainingSection(mixed_precision="no"), Beside(CPU, 0, 2)).value == "no"


def test_nothing_else_changes(make_config: MakeConfig) -> None:
    """A config with its precision differs from the one without in that key alone."""
    config = make_config()
    named = make_config(training={"mixed_precision": "fp16"})
    assert with_precision(config, Precision("fp16")) == named
