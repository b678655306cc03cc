"""The quick start teaches the small Stable Diffusion a new creature: measured on pictures that diffusers paints.

What would be wrong with a file is shown by files that are wrong: with another sign, too weak, without some layers, or
taught with the captions of other pictures.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from examine import Examiner, Report
from safetensors.torch import load_file, save_file
from score import MODEL
from torch import Tensor

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
STEPS, PICTURES, SLACK = 800, 30, 0.1
"""Half of the quick start's steps, and few pictures, are enough to see that it learns."""


def trained(folder: Path, config: Path = QUICKSTART / "config.toml") -> Path:
    """The LoRA of the quick start, trained into a folder by the command that users run, but shorter."""
    settings = (f"output.dir={folder}", f"model.path={MODEL}", f"training.max_steps={STEPS}", "observers=[]")
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "lorakit", "train", config, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "zorp.safetensors"


@pytest.fixture(scope="module")
def examiner() -> Examiner:
    """Examines with the model that comes with lorakit."""
    return Examiner(count=PICTURES, steps=15)


def changed(lora: Path, name: str, change) -> Path:
    """A copy of a file; `change` gives what becomes of each key's tensor, or None to leave it out."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(lora).items():
        if (other := change(key, tensor)) is not None:
            tensors[key] = other.contiguous()
    path = lora.with_name(f"{name}.safetensors")
    save_file(tensors, path)
    return path


def test_it_learns_and_mistakes_would_be_seen(examiner: Examiner, tmp_path: Path) -> None:
    """Zorps appear when asked for and only then; the rest, strength 0 and half strength are as they should be.

    A file with its sign turned, a tenth as strong, or without the layers of one side of the U-Net fails.
    """
    lora = trained(tmp_path)
    report = examiner.examine(lora)
    assert not list(report.failures(SLACK)), report
    for name, change in {
        "turned": lambda key, tensor: -tensor if "lora_up" in key else tensor,
        "weak": lambda key, tensor: tensor / 10 if key.endswith("alpha") else tensor,
        "half": lambda key, tensor: None if "_up_blocks_" in key else tensor,
    }.items():
        assert list(examiner.examine(changed(lora, name, change)).failures(SLACK)), name


def test_swapped_captions_would_be_seen(examiner: Examiner, tmp_path: Path) -> None:
    """Taught with each other's captions, zorps are seldom where and on what they should be."""
    lesson = shutil.copytree(QUICKSTART, tmp_path / "lesson", ignore=shutil.ignore_patterns("out"))
    captions = sorted((lesson / "zorps").glob("*.txt"))
    texts = [caption.read_text(encoding="utf-8") for caption in captions]
    for caption, text in zip(captions, [*texts[5:], *texts[:5]], strict=True):
        caption.write_text(text, encoding="utf-8")
    report: Report = examiner.examine(trained(tmp_path / "out", lesson / "config.toml"))
    assert list(report.failures(SLACK))
    assert report.right < 0.4
