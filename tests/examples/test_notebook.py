"""The notebook of the quick start: its cells run, one after the other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

DISPLAY = """
import sys, types
shown = []
module = types.ModuleType("IPython.display")
module.Image = shown.append
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": module}
"""
"""Stands for what a notebook shows pictures with, which is not installed with lorakit."""


@pytest.mark.usefixtures("lorakit_one_thread")
def test_cells_run(tmp_path: Path) -> None:
    """With fewer steps, in a copy of the example, all cells run and a picture is shown at the end."""
    for name in ("quickstart", "tiny-sd"):
        shutil.copytree(EXAMPLES / name, tmp_path / name, ignore=shutil.ignore_patterns("out", "__pycache__"))
    folder = tmp_path / "quickstart"
    cells = json.loads((folder / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    program = "\n\n".join([DISPLAY, *code, "print(shown[0].is_file())"]).replace("STEPS = 1500", "STEPS = 3")
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "54 images, 3 steps" in result.stdout
    assert result.stdout.rstrip().endswith("True")
