"""What is in a checkpoint, as far as its headers and config files tell."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from lorakit.checkpoints.location import HubModel, Location
from lorakit.checkpoints.pytorch_file import pickled_tensors
from lorakit.checkpoints.safetensors_header import read_safetensors_header
from lorakit.errors import ModelError
from lorakit.utils.safe_paths import require_regular_file

_LONGEST_JSON = 2**24
LORA_FILES = tuple(
    name + suffix for name in ("adapter_model", "pytorch_lora_weights") for suffix in (".safetensors", ".bin")
)
"""What PEFT and diffusers call LoRA files."""
_TELLING_CONFIGS = (
    "model_index.json", "unet/config.json", "transformer/config.json", "text_encoder/config.json",
    "text_conditioner/config.json", "vae/config.json", "scheduler/scheduler_config.json",
)  # fmt: skip
_DENOISERS = {"unet", "transformer"}
"""What diffusers calls the folder of the denoiser."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor, by name."""


@frozen
class CheckpointSummary:
    """Names and shapes of a checkpoint's tensors, or the configs of a folder's parts; no weights."""

    path: Path
    """The file or folder."""
    kind: Literal["safetensors", "pickle", "folder"]
    """How it is stored: one file of either format, or a diffusers folder."""
    tensors: Shapes = field(factory=dict, repr=False)
    """Shape of each tensor of a file; empty for a folder."""
    configs: Mapping[str, Mapping[str, Any]] = field(factory=dict, repr=False)
    """What a folder's JSON files say: `model_index`, and by part `unet`, `vae`, `text_encoder`, `scheduler`, …

    Where the folder holds one part only, that part's is called `config`."""
    metadata: Mapping[str, str] = field(factory=dict, repr=False)
    """Texts by which a safetensors file describes itself, by key."""


def summarize(location: Location) -> CheckpointSummary:
    """What a file, folder or Hub model holds, in milliseconds; a `ModelError` if it cannot be read safely.

    Of a Hub model only the configs are fetched that tell its family and what it predicts.
    """
    path = location.fetch(_TELLING_CONFIGS) if isinstance(location, HubModel) else location
    if os.path.isdir(path):  # noqa: PTH112 - `Path.is_dir` raises where it may not look
        return _folder_summary(path)
    if kind_of_file(path) == "pickle":
        return CheckpointSummary(path, "pickle", {name: own.shape for name, own in pickled_tensors(path).items()})
    header = read_safetensors_header(path)
    return CheckpointSummary(path, "safetensors", header.shapes, metadata=header.metadata)


def kind_of_file(path: Path) -> Literal["safetensors", "pickle"]:
    """The format of a file, by its first bytes, as names lie; a `ModelError` if it is of neither."""
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if not start:
        raise ModelError(f"{path} is empty; download it again")
    # First, as its length may begin like an archive or a pickle, neither of which continues like a length.
    if start[4:9] == b"\0\0\0\0{":
        return "safetensors"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "pickle"
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"GGUF"):
        raise ModelError(f"{path} is a GGUF file, which is not supported; use the .safetensors model it was made from")
    if start.startswith(b"version https://"):
        raise ModelError(f"{path} is a Git LFS pointer, not the model itself; run `git lfs pull` or download the file")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        cure = "download it again, signed in where the site asks for it"
        raise ModelError(f"{path} is a web page, not the file itself; {cure}")
    raise ModelError(
        f"{path} is neither a safetensors file nor a PyTorch checkpoint; check the path, or download it again"
    )


def _folder_summary(folder: Path) -> CheckpointSummary:
    files = {
        file.parent.name: file
        for file in sorted(folder.glob("*/*config.json"))
        if file.name == ("scheduler_config.json" if file.parent.name == "scheduler" else "config.json")
    }
    if (folder / "model_index.json").is_file():
        files["model_index"] = folder / "model_index.json"
    if not {"model_index", *_DENOISERS} & files.keys() and (folder / "config.json").is_file():
        files["config"] = folder / "config.json"
    lora = next((name for name in LORA_FILES if (folder / name).is_file()), None)
    if lora and not files:
        raise ModelError(f"{folder} contains a LoRA, {lora}, and no base model; network.weights takes that file")
    if not {"model_index", "config", *_DENOISERS} & files.keys():
        raise ModelError(
            f"{folder} contains no model: there is no model_index.json and no unet/config.json in it; "
            "give the folder that has subfolders such as unet, vae and text_encoder, or the path of a file"
        )
    return CheckpointSummary(folder, "folder", configs={part: read_json(file) for part, file in files.items()})


def read_json(file: Path) -> Mapping[str, Any]:
    """The object in a JSON file; a `ModelError` that names the file if there is none."""
    try:
        require_regular_file(file)
        if file.stat().st_size > _LONGEST_JSON:
            raise ValueError(f"it has more than {_LONGEST_JSON} bytes")
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}; download it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} contains no settings; download it again")
    return content
