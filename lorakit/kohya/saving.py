"""What is saved, how much of it is kept, and what it is continued from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

from lorakit.errors import ConfigError, Problem
from lorakit.kohya.draft import Command, Draft

PRECISIONS: Mapping[str, str] = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
"""lorakit's names of the number formats of --save_precision."""

_WEIGHTS_OF_A_STATE = ("model.safetensors", "pytorch_model.bin")
"""The files in a state of sd-scripts that the network's weights are in, with the keys of a LoRA file; old ones last."""

_WEIGHT_FILES = (".safetensors", ".ckpt", ".pt", ".bin")


def write_saving(command: Command, draft: Draft) -> None:
    """[saver], and those keys of [output] and [metadata] that several options, or other values, become."""
    precision = PRECISIONS[command.get("save_precision")]
    draft.set("saver", "precision", command.setting("save_precision", precision))
    if command.get("save_every_n_epochs") and not command.get("save_n_epoch_ratio"):
        draft.set("output", "save_every_n_epochs", command.setting("save_every_n_epochs"))
    _keep_last(command, draft, "keep_last", "")
    _keep_last(command, draft, "keep_last_states", "_state")
    _resume(command, draft)
    is_negative = command.get("metadata_is_negative_embedding")
    if is_negative:
        value = is_negative.strip().lower() in ("true", "1", "yes")
        draft.set("metadata", "is_negative_embedding", command.setting("metadata_is_negative_embedding", value))


def _keep_last(command: Command, draft: Draft, key: str, ending: str) -> None:
    """How many saves stay; --save_last_n_steps counts steps, and keeps the save that many steps ago as well."""
    every_n_epochs = command.get("save_n_epoch_ratio") or command.get("save_every_n_epochs")
    of_epochs, of_steps = f"save_last_n_epochs{ending}", f"save_last_n_steps{ending}"
    epochs, steps, every = (command.get(name) for name in (of_epochs, of_steps, "save_every_n_steps"))
    kept = {}
    if epochs and every_n_epochs:
        kept[of_epochs] = epochs
    if steps and every:
        kept[of_steps] = steps // every + 1
    for name, value in ((of_epochs, epochs), (of_steps, steps)):
        if value and name not in kept:
            draft.note(name, "has no effect, as there are no intermediate saves")
    if kept:
        name, count = max(kept.items(), key=lambda item: item[1])
        draft.set("output", key, command.setting(name, count))
        if len(kept) > 1:
            draft.note(
                min(kept, key=lambda item: kept[item]), f"is combined with --{name} in lorakit: {count} saves are kept"
            )


def _resume(command: Command, draft: Draft) -> None:
    """The weights of a state, which win over --network_weights as they do with sd-scripts."""
    state = command.get("resume")
    if not state:
        return
    if command.get("resume_from_huggingface"):
        draft.mark_unsupported(
            "resume", state, "the state is on the Hub: download it with `hf download`, and give its folder"
        )
        return
    folder = command.on_disk(state)
    _refuse_other_states(state, folder)
    names = [name for name in _WEIGHTS_OF_A_STATE if (folder / name).is_file()]
    file = f"{state.rstrip('/')}/{(names or _WEIGHTS_OF_A_STATE)[0]}"
    draft.set("network", "weights", command.setting("resume", command.path(file)))
    draft.note("resume", "loads only the weights: optimizer and schedule start over at the first step")
    if command.get("network_weights"):
        draft.note("network_weights", "has no effect with --resume")


def _refuse_other_states(state: str, folder: Path) -> None:
    """Raises ConfigError for a file in place of the folder of a state, and for states that are not sd-scripts'."""
    if PureWindowsPath(state).suffix.lower() in _WEIGHT_FILES or folder.is_file():
        is_of_state = PureWindowsPath(state).name in _WEIGHTS_OF_A_STATE
        parent = os.path.dirname(state) or "."  # noqa: PTH120 - keeps the path as it was typed
        hint = f"--resume={parent}" if is_of_state else f"to start from a LoRA file: --network_weights={state}"
        raise ConfigError([Problem("--resume", f"must be the folder of a state, not a file: {state}", hint)])
    if (folder / "state.json").is_file() or any(folder.glob("step*/state.json")):
        hint = f"lorakit train CONFIG --resume={state}"
        raise ConfigError([Problem("--resume", f"{state} is a state of lorakit, not of sd-scripts", hint)])
