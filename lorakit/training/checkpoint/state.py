"""States: all that is needed to resume a run from the step it had reached.

Randomness is keyed by step and sample, so there is no generator to save: LoRA matrices, optimizer,
LR schedule, loss scale and the number of steps done are everything. A state is a folder that
appears under its name only when it is complete and was read back.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from attrs import frozen
from safetensors import SafetensorError
from torch import Tensor

from lorakit._version import __version__
from lorakit.checkpoints.safetensors_content import safetensors_content
from lorakit.checkpoints.safetensors_header import safetensors_shapes
from lorakit.config.train_config import TrainConfig
from lorakit.data.cache.file_cache import content_digest
from lorakit.errors import AdapterError, ConfigError, DataError, ModelError, OutputError, Problem
from lorakit.training.checkpoint.compatibility import RunFingerprint
from lorakit.training.checkpoint.serialization import NotSerializableError, deserialize, serialize
from lorakit.utils.atomic_io import (
    as_output_error,
    commit,
    flush_to_disk,
    remove_folder,
    staging_dir,
    write_atomically,
)

log = logging.getLogger(__name__)

FORMAT = 6
"""Number of the layout of states; a state of another one cannot be read."""

_TENSORS, _OPTIMIZER, _DESCRIPTION = "network.safetensors", "optimizer.safetensors", "state.json"
_END = "finished.json"
"""A file in states from which the run has continued to its end."""


@frozen
class State:
    """The step that a run has reached, and all that belongs to it."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    """How many the whole run was to take."""
    tensors: Mapping[str, Tensor]
    """The adapters as they are trained, by the keys of a LoRA file."""
    state_dicts: Mapping[str, Any]
    """State dicts of `optimizer`, `lr_scheduler` and `scaler`, and `ema` where weights are averaged."""


def state_folder(config: TrainConfig) -> Path:
    """The folder that holds the states of a run."""
    return config.output.dir / f"{config.output.name}-state"


def write_state(state: State, fingerprint: RunFingerprint, folder: Path) -> Path:
    """Write a state into a folder, read it back, and remove older ones as the config says; returns its own folder.

    Those of later steps, of an earlier run in the same folder, stay.
    Raises OutputError when it cannot be written, or is not read back as it was written.
    """
    final = folder / f"step{state.step:08d}"
    with staging_dir(final) as scratch:
        written = scratch / final.name
        try:
            with as_output_error(final):
                written.mkdir()
                _write(state, fingerprint, written)
            _verified(written, _described(written))
            read_state(written, torch.device("cpu"))
        except NotSerializableError as error:
            raise OutputError(f"{final} was not written: {error}") from error
        except ConfigError as error:
            raise OutputError(f"{final} was not read back as it was written: {error}") from error
        commit(written, final)
    so_far = [state for state in states_in(folder) if state.name <= final.name]
    for older in so_far[: -fingerprint.config.output.keep_last_states]:
        try:
            remove_folder(older)
        except OutputError as error:
            log.warning("an older state was not removed: %s", error)
    return final


def _write(state: State, fingerprint: RunFingerprint, folder: Path) -> None:
    """Write the files of a state, those that are described before the description, and flush them."""
    contents = {_TENSORS: safetensors.torch.save(dict(state.tensors)), _OPTIMIZER: serialize(dict(state.state_dicts))}
    description = {
        "format": FORMAT,
        "lorakit": __version__,
        "step": state.step,
        "total_steps": state.total_steps,
        "files": {name: blake2b(content, digest_size=16).hexdigest() for name, content in contents.items()},
        **fingerprint.to_dict(),
    }
    contents[_DESCRIPTION] = json.dumps(description, indent=1).encode()
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    with suppress(OSError):
        flush_to_disk(folder)


def note_end(folder: Path, total_steps: int) -> None:
    """Note in a folder's states that their run has continued to its end."""
    for state in states_in(folder):
        with suppress(OutputError):
            write_atomically(state / _END, json.dumps({"total_steps": total_steps}).encode())


def forget_end(folder: Path) -> None:
    """Take that back, as the run begins again."""
    for state in states_in(folder):
        with suppress(OSError):
            (state / _END).unlink(missing_ok=True)


def has_ended(state: Path, total_steps: int) -> bool:
    """Whether the run of a state has continued to its end, which was after `total_steps`."""
    try:
        noted = json.loads((state / _END).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(noted == {"total_steps": total_steps})


def states_in(folder: Path) -> list[Path]:
    """The states in a folder, oldest first; one may be damaged all the same."""
    return sorted(path for path in folder.glob("step*") if path.is_dir())


def read_state(folder: Path, device: torch.device) -> State:
    """A state, its optimizer's tensors on a device. Raises ConfigError when it is damaged."""
    with state_errors(folder):
        description = _described(folder)
        safetensors_shapes(folder / _TENSORS)
        tensors, _ = safetensors_content(folder / _TENSORS)
        state_dicts = deserialize(folder / _OPTIMIZER, device)
        return State(description["step"], description["total_steps"], tensors, state_dicts)


def find_state(fingerprint: RunFingerprint, folder: Path | None) -> Path:
    """The state in a folder, or the newest undamaged one of this run; a warning names newer ones that were skipped.

    Raises ConfigError when there is none, or when it is damaged or belongs to another run.
    """
    where = folder or state_folder(fingerprint.config)
    states = states_in(where) if folder is None else [folder] * (folder / _DESCRIPTION).is_file()
    if not states:
        raise ConfigError([Problem("--resume", f"there is no state in {where}", "start without --resume")])
    refusals: list[ConfigError] = []
    for state in reversed(states):
        try:
            _check(state, fingerprint)
        except ConfigError as error:
            refusals.append(error)
            continue
        for refusal in refusals:
            log.warning("skipping a newer state: %s", refusal)
        return state
    raise refusals[0]


def _check(folder: Path, fingerprint: RunFingerprint) -> None:
    """Raise ConfigError unless a state is undamaged and belongs to a run."""
    description = _described(folder)
    with state_errors(folder):
        problems = fingerprint.problems_with(description)
    if problems:
        what = "".join(f"\n  {problem}" for problem in problems)
        hint = f'Undo what differs, or start a new run from its weights: network.weights = "{folder / _TENSORS}"'
        message = f"the state in {folder} was saved by a run with another config or dataset:{what}\n{hint}"
        raise ConfigError([Problem("--resume", message)])
    _verified(folder, description)
    if description["lorakit"] != __version__:
        message = "the state in %s was saved by lorakit %s, this is %s: the result may differ from that of either"
        log.warning(message, folder, description["lorakit"], __version__)


def _described(folder: Path) -> dict[str, Any]:
    """What a state says of itself. Raises ConfigError when it is damaged, or of another format."""
    with state_errors(folder):
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        step, version, number = int(description["step"]), str(description["lorakit"]), description.get("format", 1)
        if number == FORMAT:
            return {**description, "step": step, "total_steps": int(description["total_steps"]), "lorakit": version}
    problem = f"the state in {folder} has format {number}, of lorakit {version}; this lorakit reads format {FORMAT}"
    raise ConfigError(
        [Problem("--resume", problem, f"resume it with lorakit {version}, or start a new run from its weights")]
    )


def _verified(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the files of a state are, byte for byte, as they were written."""
    with state_errors(folder):
        for name in (_TENSORS, _OPTIMIZER):
            if content_digest(folder / name) != description["files"][name]:
                raise ValueError(f"{name} is not as it was written")


@contextmanager
def state_errors(folder: Path) -> Iterator[None]:
    """Raise what a damaged state causes as a ConfigError that names its folder."""
    try:
        yield
    except (
        OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError,
        DataError, AdapterError, ModelError,
    ) as error:  # fmt: skip
        problem = f"the state in {folder} is damaged: {type(error).__name__}: {error}"
        raise ConfigError([Problem("--resume", problem, "give another state's folder")]) from error
