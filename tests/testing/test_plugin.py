"""The pytest plugin: loaded everywhere, at no cost, with fixtures that plugin authors can train with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOREIGN_TESTS = """
import os
from pathlib import Path

import pytest
from PIL import Image

import lorakit
from lorakit.checkpoints import summarize
from lorakit.models.families.sd.detect import recognise
from lorakit.config.load import config_from_tables


def test_models(tiny_sd1, tiny_sd1_file):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert recognise(summarize(tiny_sd1)) == recognise(summarize(tiny_sd1_file))


def test_photographs(photographs):
    pictures = sorted(photographs.glob("*.png"))
    sizes = {Image.open(picture).size for picture in pictures}
    assert len(pictures) == len(sizes) == 4
    assert all(picture.with_suffix(".txt").read_text().count(",") > 0 for picture in pictures)
    assert all(low < high for picture in pictures for low, high in Image.open(picture).getextrema())


@pytest.mark.parametrize("source", ["folder", "file"])
def test_training(train_tables, tiny_sd1_file, tmp_path, source):
    if source == "file":
        train_tables["model"]["path"] = str(tiny_sd1_file)
    train_tables["output"]["name"] = source
    path = lorakit.train(config_from_tables(train_tables, tmp_path))
    assert path == tmp_path / "out" / f"{source}.safetensors"
    assert path.stat().st_size > 100_000


def test_tables_are_fresh(train_tables):
    assert "name" not in train_tables["output"]
"""


def test_imports_nothing_heavy() -> None:
    """Loading the plugin, as every run of pytest does, imports no torch, numpy or Pillow, nor more of lorakit."""
    program = "import pytest, sys; old = {*sys.modules}; import lorakit.testing.plugin; print(*{*sys.modules} - old)"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    imported = {name.partition(".")[0] for name in run.stdout.split()}
    assert imported & {"torch", "numpy", "PIL", "diffusers", "transformers"} == set()
    assert {name for name in run.stdout.split() if name.startswith("lorakit")} == {
        "lorakit",
        "lorakit._version",
        "lorakit.api",
        "lorakit.api.hookspecs",
        "lorakit.testing",
        "lorakit.testing.plugin",
    }


def test_fixtures_serve_other_projects(tmp_path: Path) -> None:
    """In a project of its own, a test has the fixtures with nothing to set up, and can train with them."""
    (tmp_path / "test_foreign.py").write_text(FOREIGN_TESTS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout
    assert "5 passed" in run.stdout
