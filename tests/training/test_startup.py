"""How a run starts: what it imports before the first step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomlkit

COMMAND = (
    "import sys; from lorakit.__main__ import main\n"
    "try: main()\nfinally: print('imported:', *sys.modules, file=sys.stderr)"
)

ENCODERS = {"diffusers", "transformers"}
"""Where the encoders of images and captions come from."""
OTHERS = {"accelerate", "bitsandbytes", "huggingface_hub", "peft", "scipy", "sympy", "tensorboard"}
"""What these libraries and PyTorch's compiler import in turn, and what only other configs need."""


def imported(folder: Path, *arguments: str) -> set[str]:
    """The top-level packages that a command imports, the text after `imported:` on standard error."""
    command = [sys.executable, "-c", COMMAND, *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=True)
    modules = result.stderr.rpartition("imported:")[2].split()
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("network", ["lierla", "c3lier"])
def test_a_warm_start_imports_only_what_it_uses(network: str, tables: dict[str, Any], tmp_path: Path) -> None:
    """With all data encoded before, a U-Net's run imports none of the libraries that encoders and others come from."""
    tables["network"] |= {"name": network, "parts": ["unet"]}
    tables["training"]["max_steps"] = 1
    tables["data"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "config.toml").write_text(tomlkit.dumps(tables))
    assert imported(tmp_path, "train", "config.toml") >= ENCODERS
    again = imported(tmp_path, "train", "config.toml", "--set", "output.name=again")
    assert again & (ENCODERS | OTHERS) == set()
    assert (tmp_path / "out" / "again.safetensors").is_file()
