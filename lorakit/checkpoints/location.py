"""Where a base model is: on this disk, or on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NewType

from attrs import frozen

from lorakit.errors import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@frozen
class HubModel:
    """A model on the Hugging Face Hub, fetched file by file as it is needed."""

    repo: str
    """Owner and name: `stable-diffusion-v1-5/stable-diffusion-v1-5`."""
    looked_at: Path
    """Where a folder of that name was looked for first."""

    def __str__(self) -> str:
        return self.repo

    def fetch(self, files: Sequence[str]) -> Path:
        """The local folder that holds those of the files that the model has; downloads what is not there yet.

        A `ModelError` if the Hub has no such model, or cannot be reached and nothing was downloaded before.
        """
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return _downloaded(self.repo, tuple(files))
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"{self.repo} was not found: there is no {self.looked_at}, and it could not be fetched from the "
                f"Hugging Face Hub ({reason}); download the model and give the path of its folder or file"
            ) from error


@cache
def _downloaded(repo: str, files: tuple[str, ...]) -> Path:
    """The local folder of a repository with these files; asks the Hub once per process."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=list(files)))


Location = Path | HubModel
"""A file or folder on this disk, or a model on the Hub."""

ModelPath = NewType("ModelPath", str)
"""A config's value for a location: in a config that was read, an absolute path or a Hub id."""


def locate(path: str, base: Path) -> Location:
    """The file or folder if there is one, relative to `base`; else the Hub model of that name.

    A `ModelError` if nothing is there and the text cannot be a Hub id. Asks no network.
    """
    found = base.absolute() / Path(path).expanduser()
    if found.exists():
        return found
    if _HUB_ID.fullmatch(path) and not path.endswith(_FILE_SUFFIXES):
        return HubModel(path, found)
    raise ModelError(f"{found} does not exist; give a .safetensors or .ckpt file, a diffusers folder, or a Hub id")
