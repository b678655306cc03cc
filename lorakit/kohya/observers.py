"""Logs, uploads and previews: the tables [[observers]]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PureWindowsPath
from typing import Any

from lorakit.api.components import ObserverConfig
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.sd_scripts_output import HUB
from lorakit.config.toml_files import read_toml
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.draft import Command, Draft, Setting, Table
from lorakit.plugins.catalog import Catalog

_TRACKER_KEYS: Mapping[str, type] = {"entity": str, "group": str, "tags": list, "notes": str}
"""Settings of Weights & Biases in a file for --log_tracker_config that an observer has too."""

_TRACKER_NAME = "network_train"
"""sd-scripts' default project."""

_OF_THE_HUB = tuple(option.name for option in HUB if option.key and option.name != "huggingface_repo_id")


def write_observers(command: Command, draft: Draft, catalog: Catalog) -> None:
    """TensorBoard, Weights & Biases and the Hub, as far as the options ask for them."""
    folder, kind = command.get("logging_dir"), command.get("log_with")
    if kind in ("tensorboard", "all") and not folder:
        raise ConfigError([Problem("--log_with", f"{kind} needs --logging_dir")])
    if folder and kind != "wandb":
        draft.observers.append(_tensorboard(command, folder))
    if kind in ("wandb", "all"):
        draft.observers.append(_wandb(command, draft))
        plugin = OPTIONS["wandb_run_name"].plugin
        if "wandb" not in catalog.of_kind(ObserverConfig):
            draft.note("log_with", f"{kind} needs the plugin {plugin}: pip install {plugin}")
    else:
        _tell_unused(command, draft, "log_with=wandb", ("log_tracker_config", "wandb_run_name"))
    if command.get("huggingface_repo_id"):
        draft.observers.append(_hub(command, draft))
    else:
        _tell_unused(command, draft, "huggingface_repo_id", _OF_THE_HUB)
    _write_validation(command, draft)


def _tell_unused(command: Command, draft: Draft, missing: str, options: Iterable[str]) -> None:
    for option in options:
        if command.get(option) and command.is_typed(option):
            draft.note(option, f"has no effect without --{missing}")


def _tensorboard(command: Command, folder: str) -> Table:
    observer = {
        "name": command.setting("logging_dir", "tensorboard"),
        "dir": command.setting("logging_dir", command.path(folder)),
    }
    if command.get("log_prefix"):
        observer["prefix"] = command.setting("log_prefix")
    return observer


def _wandb(command: Command, draft: Draft) -> Table:
    observer = {
        "name": command.setting("log_with", "wandb"),
        "project": command.setting("log_tracker_name", command.get("log_tracker_name") or _TRACKER_NAME),
    }
    if command.get("logging_dir"):
        observer["dir"] = command.setting("logging_dir", command.path(command.get("logging_dir")))
    if command.get("log_tracker_config"):
        observer |= _tracker_settings(command, draft)
    if command.get("wandb_run_name"):
        observer["run_name"] = command.setting("wandb_run_name")
    if command.get("wandb_api_key"):
        draft.note("wandb_api_key", "is not written to a file: run `wandb login` once, or set WANDB_API_KEY")
    return observer


def _tracker_settings(command: Command, draft: Draft) -> Table:
    """The table [wandb] of the file, with the option as its source; entries without a key are reported."""
    name = command.get("log_tracker_config")
    try:
        settings: Any = read_toml(command.on_disk(name)).get("wandb", {})
    except ValueError as error:
        draft.note("log_tracker_config", f"{name} {error}")
        return {}
    found: Table = {}
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        target = "run_name" if key == "name" else key
        if isinstance(value, _TRACKER_KEYS.get(key, str if key == "name" else ())):
            found[target] = Setting(value, f"--log_tracker_config {key}")
        else:
            draft.mark_unsupported("log_tracker_config", name, f"its key {key} is ignored")
    return found


def _hub(command: Command, draft: Draft) -> Table:
    visibility = command.get("huggingface_repo_visibility")
    observer = {
        "name": command.setting("huggingface_repo_id", "hub"),
        "repo_id": command.setting("huggingface_repo_id"),
    }
    if command.get("huggingface_repo_type"):
        observer["repo_type"] = command.setting("huggingface_repo_type")
    if command.get("huggingface_path_in_repo"):
        folder = command.get("huggingface_path_in_repo").strip("/")
        observer["path_in_repo"] = command.setting("huggingface_path_in_repo", folder)
    if visibility:
        observer["private"] = command.setting("huggingface_repo_visibility", visibility != "public")
    if command.get("save_state_to_huggingface"):
        observer["states"] = command.setting("save_state_to_huggingface")
    if command.get("huggingface_token"):
        draft.note("huggingface_token", "is not written to a file: run `hf auth login` once, or set HF_TOKEN")
    return observer


def _write_validation(command: Command, draft: Draft) -> None:
    """How often to validate, where that is not after each epoch on everything, which lorakit does by itself."""
    if command.get("in_json") and command.get("validation_split") and not command.get("dataset_config"):
        draft.note("validation_split", "holds out images in lorakit; sd-scripts trains on all images of --in_json")
    options = {
        "every_n_epochs": "validate_every_n_epochs",
        "every_n_steps": "validate_every_n_steps",
        "max_steps": "max_validation_steps",
    }
    given = {key: command.setting(name) for key, name in options.items() if command.get(name)}
    if not given:
        return
    epochs = Setting(1, "sd-scripts also validates after each epoch by default")
    name = Setting("validation", next(iter(given.values())).source)
    draft.observers.append({"name": name, "every_n_epochs": epochs, **given})


_PREVIEW_DEFAULTS: Mapping[str, str] = {
    "width": "preview_size",
    "height": "preview_size",
    "steps": "preview_steps",
    "scale": "preview_scale",
    "guidance": "preview_guidance",
    "sampler": "preview_sampler",
}
"""The attributes of a family with its own defaults of previews, by key."""


def write_previews(command: Command, draft: Draft) -> None:
    """Previews. Raises ConfigError where a line asks for them and says no prompts; sd-scripts stops the run there."""
    counts = [name for name in ("sample_every_n_epochs", "sample_every_n_steps") if (command.get(name) or 0) > 0]
    for name in ("sample_every_n_epochs", "sample_every_n_steps"):
        if command.is_typed(name) and name not in counts:
            draft.note(name, f"{command.get(name)} means never")
    asked = [*counts, *(["sample_at_first"] if command.get("sample_at_first") else [])]
    if asked and not command.get("sample_prompts") and not any(map(command.is_typed, asked)):
        source, hint = command.sources[asked[0]], "add --sample_prompts=FILE after the file"
        draft.remarks.append(Problem(source, "is ignored, as there are no prompts", hint))
        return
    if asked and not command.get("sample_prompts"):
        raise ConfigError([Problem(f"--{asked[0]}", "needs --sample_prompts, the file with the prompts")])
    if not asked:
        for name in ("sample_prompts", "sample_sampler"):
            if command.is_typed(name) and name not in command.script.ignores:
                draft.note(name, "has no effect without --sample_every_n_epochs or --sample_every_n_steps")
        return
    if len(counts) == 2:
        draft.note("sample_every_n_steps", "has no effect with --sample_every_n_epochs")
        asked.remove("sample_every_n_steps")
    observer = {
        "name": command.setting("sample_prompts", "samples"),
        "prompts": command.setting("sample_prompts", _prompts(command)),
    }
    observer |= {name.removeprefix("sample_"): command.setting(name) for name in asked}
    if "sample_sampler" in command.given and "sample_sampler" not in command.script.ignores:
        observer["sampler"] = command.setting("sample_sampler")
    draft.observers.append({**_other_defaults(command), **observer})


def _other_defaults(command: Command) -> Table:
    """Settings of previews for which sd-scripts has another default than the model."""
    model, drawn = command.model(), command.script.previews
    own = {key: getattr(model, attribute) for key, attribute in _PREVIEW_DEFAULTS.items() if key in drawn}
    return {
        key: Setting(drawn[key], f"default of sd-scripts; without this line, {value}")
        for key, value in own.items()
        if value not in ("", None, drawn[key])
    }


def _prompts(command: Command) -> str | list[str]:
    """The path of the prompt file; a text that leads to none holds the prompts themselves, one in each line."""
    text: str = command.get("sample_prompts")
    try:
        is_file = command.on_disk(text).is_file()
    except (OSError, ValueError):  # a name that is too long
        is_file = False
    if is_file or PureWindowsPath(text.strip()).suffix.lower() in (".txt", ".toml", ".json"):
        return command.path(text)
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
