"""States: all that is needed to go on with a run from the step it had come to.

Randomness is keyed by step and sample, so there is no generator to save: factors, optimizer,
LR schedule, loss scale and the number of steps done are everything. A state is a folder that
appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tomlkit
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit
from lorakit.config.sections import TrainConfig
from lorakit.config.writing import to_toml
from lorakit.errors import ConfigError, OutputError, Problem
from lorakit.files import flush_to_disk

NEUTRAL_SECTIONS = ("output", "metadata", "saver", "observers", "attention")
"""Sections that may differ between a state's config and the config of the run that takes it up."""

NEUTRAL_KEYS = {
    "data": ("cache_dir", "workers", "encode_batch_size"),
    "training": (
        "max_epochs", "max_steps", "on_nonfinite", "device", "process_timeout", "gradient_checkpointing", "compile",
        "compile_backend",
    ),
}  # fmt: skip
"""Keys of other sections that may differ too: what is trained does not depend on them, but for rounding."""


def state_folder(config: TrainConfig) -> Path:
    """The folder that holds the states of a run."""
    return config.output.dir / f"{config.output.name}-state"


def write_state(config: TrainConfig, step: int, tensors: Mapping[str, Tensor], machinery: Mapping[str, Any]) -> Path:
    """Write a state, and remove older ones as the config says; gives its folder.

    Those of later steps, of an earlier run in the same folder, stay. Raises OutputError when it cannot be written.
    """
    folder = state_folder(config)
    final = folder / f"step{step:08d}"
    partial = folder / f".partial-{os.getpid()}-{step}"
    description = {"step": step, "lorakit": lorakit.__version__, "config": config_key(config)}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), partial / "network.safetensors")
        torch.save(dict(machinery), partial / "machinery.pt")
        (partial / "state.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        for file in partial.iterdir():
            flush_to_disk(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"the state cannot be written to {final}: {error.strerror}") from error
    so_far = [state for state in whole_states(config) if state.name <= final.name]
    for older in so_far[: -config.output.keep_last_states]:
        shutil.rmtree(older, ignore_errors=True)
    return final


def read_state(folder: Path, device: torch.device) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """The step, the factors and the machinery of a state. Raises ConfigError when it is damaged."""
    step, _ = _described(folder)
    with _damage_told(folder):
        tensors = load_file(folder / "network.safetensors")
        machinery = torch.load(folder / "machinery.pt", map_location=device, weights_only=True)
    return step, tensors, machinery


def _described(folder: Path) -> tuple[int, str]:
    """The step of a state, and the `config_key` of its run. Raises ConfigError when it is damaged."""
    with _damage_told(folder):
        description = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return int(description["step"]), str(description["config"])


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        problem = f"the state in {folder} is damaged: {type(error).__name__}: {error}"
        raise ConfigError([Problem("--resume", problem, "give another state's folder")]) from error


def whole_states(config: TrainConfig) -> list[Path]:
    """The states of a run, oldest first."""
    return sorted(path.parent for path in state_folder(config).glob("step*/state.json"))


def find_state(config: TrainConfig, folder: Path | None) -> Path:
    """The state in a folder, or the newest one that belongs to this config.

    Raises ConfigError when there is none, or when it is damaged or belongs to another config.
    """
    states = [folder] if folder else whole_states(config)
    if not states or not (states[-1] / "state.json").is_file():
        where = folder or state_folder(config)
        raise ConfigError([Problem("--resume", f"there is no state in {where}", "start without --resume")])
    key = config_key(config)
    for state in reversed(states):
        if _described(state)[1] == key:
            return state
    problem = f"the state in {states[-1]} was saved by a run with another config"
    raise ConfigError([Problem("--resume", problem, "use the config file beside the adapters it saved")])


def config_key(config: TrainConfig) -> str:
    """A hash of all that must stay the same when a state is taken up."""
    tables = tomlkit.parse(to_toml(config)).unwrap()
    relevant = {
        section: {key: value for key, value in table.items() if key not in NEUTRAL_KEYS.get(section, ())}
        for section, table in tables.items()
        if section not in NEUTRAL_SECTIONS
    }
    return blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=16).hexdigest()
