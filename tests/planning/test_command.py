"""`lorakit plan` as users run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from lorakit.utils.bytes import in_gib, parse_size


@pytest.fixture
def folder(tables: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with a config."""
    tables["data"]["batch_size"] = 3
    tables["network"]["parts"] = ["unet"]
    (tmp_path / "config.toml").write_text(tomlkit.dumps(tables))
    return tmp_path


def lorakit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder."""
    command = [sys.executable, "-m", "lorakit", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_plan(folder: Path) -> None:
    """The plan counts images, batches, steps and epochs, tells memory and times, and leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    result = lorakit(folder, "plan", "config.toml", "--memory", "1200MB", "--measure")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split("  ")[0] == "BUCKET"
    assert lines[1].split() == ["64x64", "4", "3", "2"]
    assert "4 images; 2 batches and 2 steps per epoch; 6 steps in all, 3 epochs" in lines
    for start in ("encoding images ", "encoding captions ", "training, batches of 3 at 64x64 ", "  activations "):
        assert any(line.startswith(start) for line in lines), start
    assert "The current config fits into 1.12 GiB, with 1.00 GiB left for fragmentation and" in lines
    assert any(line.endswith('  mixed_precision = "bf16"  (also faster on a GPU)') for line in lines)
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("3 of 64x64 ") for line in lines)
    assert any(line.startswith("All 6 steps: about ") for line in lines)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("size", ["8i", "GB", "8XB", "-1GB", "0GB", "8 iB", "8,5GB"])
def test_bad_memory(folder: Path, size: str) -> None:
    """What is no amount of memory is wrong usage, and said before anything is read."""
    result = lorakit(folder, "plan", "nowhere.toml", f"--memory={size}")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"Invalid value for '--memory': '{size}' is " in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_model(folder: Path) -> None:
    """A model that is not there is said as `lorakit check` says it."""
    answers = [
        lorakit(folder, name, "config.toml", "--set", "model.path=gone.safetensors") for name in ("check", "plan")
    ]
    assert [(answer.returncode, answer.stdout, answer.stderr) for answer in answers] == 2 * [(2, "", answers[0].stderr)]
    assert "gone.safetensors" in answers[0].stderr


def test_problems_of_the_loss_are_told_once(folder: Path) -> None:
    """What training would refuse when it sees the model is refused here."""
    result = lorakit(
        folder, "plan", "config.toml", "--set", "loss.v_pred_like_loss=0.5", "--set", "loss.zero_terminal_snr=true"
    )
    assert result.returncode == 2
    assert "loss." in result.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9), ("8 GiB", 8 * 2**30), ("7.5gb", 75 * 10**8), ("512MiB", 2**29), ("100KB", 10**5),
        ("3kib", 3072), ("12B", 12), (".5TB", 5 * 10**11),
        ("8", 8 * 10**9), ("7.5", 75 * 10**8), ("8G", 8 * 10**9), ("8 g", 8 * 10**9), ("8Gi", 8 * 2**30),
    ],
)  # fmt: skip
def test_amounts_of_memory(text: str, size: int) -> None:
    """Amounts are read in units of 1000 and of 1024, whatever their case."""
    assert parse_size(text) == size


def test_amounts_are_written_with_digits_that_say_something() -> None:
    """GiB have two digits behind the point, or two that are not zero."""
    sizes = (0, 2**30, 5 * 2**29, 2**20, 123 * 2**20, 1024)
    assert [in_gib(size) for size in sizes] == ["0.00", "1.00", "2.50", "0.00098", "0.12", "1e-06"]
