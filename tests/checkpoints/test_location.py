"""Where base models are looked for: on this disk first, then on the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.checkpoints import HubModel, locate
from lorakit.errors import ModelError


def test_what_exists_is_a_path(tmp_path: Path) -> None:
    """Files and folders are found relative to the base, absolute, and even where the name could be a Hub id."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/name", tmp_path) == tmp_path / "org" / "name"
    assert locate(str(tmp_path / "org"), Path("/")) == tmp_path / "org"


def test_owner_and_name_are_a_hub_id(tmp_path: Path) -> None:
    """What is not on the disk and has the form of a Hub id is one, and is written as it was given."""
    location = locate("stable-diffusion-v1-5/stable-diffusion-v1-5", tmp_path)
    assert isinstance(location, HubModel)
    assert str(location) == "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize("path", ["gone.safetensors", "models/gone.ckpt", "./a/b", "a/b/c", "name", "/a/b", "~/a/b"])
def test_a_missing_file_is_named(tmp_path: Path, path: str) -> None:
    """What is neither there nor has the form of a Hub id is refused with the whole path that was tried."""
    with pytest.raises(ModelError, match="does not exist") as caught:
        locate(path, tmp_path)
    assert str(tmp_path / Path(path).expanduser()) in str(caught.value)


def in_hub_cache(code: str, cache: Path) -> str:
    """What code prints in a fresh process whose Hub cache is this folder and which has no network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_hub_model_is_summarised_from_the_cache(tmp_path: Path) -> None:
    """A Hub model that was downloaded before is summarised offline."""
    repo, commit = tmp_path / "models--some--model", "0" * 40
    unet = repo / "snapshots" / commit / "unet"
    unet.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (unet.parent / "model_index.json").write_text("{}")
    (unet / "config.json").write_text('{"in_channels": 4}')
    code = (
        "from pathlib import Path; from lorakit.checkpoints import locate, summarize;"
        "print(dict(summarize(locate('some/model', Path('/'))).configs['unet']))"
    )
    assert in_hub_cache(code, tmp_path).strip() == "{'in_channels': 4}"


def test_unreachable_hub_model_says_what_was_tried(tmp_path: Path) -> None:
    """Offline, the message names the folder, the Hub and the cure."""
    code = (
        "from pathlib import Path; from lorakit.checkpoints import locate, summarize\n"
        "from lorakit.errors import ModelError\n"
        "try: summarize(locate('nobody/nothing', Path('/base')))\n"
        "except ModelError as error: print(error)"
    )
    message = in_hub_cache(code, tmp_path)
    assert message.startswith("nobody/nothing was not found: there is no /base/nobody/nothing, and it could not")
    assert "download the model and give the path" in message
