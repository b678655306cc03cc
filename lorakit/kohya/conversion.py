"""From the options of `train_network.py` to the tables of a config that trains the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from lorakit.config.reading import config_from_tables
from lorakit.config.sections import TrainingSection
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.components import write_lr_scheduler, write_network, write_optimizer
from lorakit.kohya.datasets import FOLDER_OPTIONS, write_data
from lorakit.kohya.drafts import Command, Draft, Setting
from lorakit.kohya.options import OPTIONS, Option
from lorakit.kohya.states import State, known_keys, target_of
from lorakit.plugins import Catalog

PRECISIONS: Mapping[str, str] = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
"""lorakit's names of the number formats of --save_precision."""


def convert(given: Mapping[str, Any], folder: Path, target: Path, catalog: Catalog) -> Draft:
    """The config that trains what the options `given` train when sd-scripts is called in `folder`.

    The config is for a file in `target`. Raises ConfigError for what sd-scripts itself cannot train.
    """
    command = Command(given, known_keys(catalog), folder.absolute(), target.absolute())
    _refuse_missing(command)
    draft = Draft()
    for option in OPTIONS.values():
        _write_plainly(option, command, draft)
    _model(command, draft)
    write_data(command, draft)
    write_network(command, draft, catalog)
    write_optimizer(command, draft, catalog)
    write_lr_scheduler(command, draft, catalog)
    _attention(command, draft)
    _training(command, draft)
    _saving(command, draft)
    _logs(command, draft)
    _previews(command, draft)
    return draft


def check(draft: Draft, target: Path, catalog: Catalog) -> tuple[Problem, ...]:
    """What `lorakit check` would say is wrong with the config, such as files that are not there yet."""
    try:
        config_from_tables(draft.tables(), target, catalog)
    except ConfigError as error:
        return error.problems
    return ()


def _refuse_missing(command: Command) -> None:
    needed = ("pretrained_model_name_or_path", "output_dir")
    missing = [Problem(f"--{name}", "is missing") for name in needed if not command.get(name)]
    if missing:
        raise ConfigError(missing)


def _write_plainly(option: Option, command: Command, draft: Draft) -> None:
    """Copy an option that needs no more, or note that it has no counterpart."""
    value = command.get(option.name)
    is_given = option.name in command.given and value != option.default
    state = command.state(option.name)
    if option.name in FOLDER_OPTIONS and command.get("dataset_config"):
        return
    if state is State.LATER and is_given and value not in (0, "", []):
        draft.leave_out(option.name, value, option.later)
    if state is not State.WORKS or option.special:
        return
    section, key, flag_value = target_of(option)
    default = command.keys[option.key.partition(" = ")[0]]
    if option.kind == "flag" and option.key.endswith(("]", '"', "true")):
        if value:
            draft.set(section, key, command.setting(option.name, flag_value))
        return
    # Zero, and an empty text, are how sd-scripts is told not to use what lorakit is told by leaving a key out.
    is_off = value is None or (default is None and not value)
    if not is_off and (option.name in command.given or value != default):
        draft.set(section, key, command.setting(option.name, _copied(option, value, command)))


def _copied(option: Option, value: Any, command: Command) -> Any:
    return command.path(value) if option.kind == "path" else value


def _model(command: Command, draft: Draft) -> None:
    name = "pretrained_model_name_or_path"
    draft.set("model", "path", command.setting(name, command.model_path(command.get(name))))
    if command.state("v_parameterization") is State.WORKS:
        is_velocity = command.get("v_parameterization")
        source = "--v_parameterization" + ("" if is_velocity else " is absent")
        draft.set("model", "prediction", Setting("v_prediction" if is_velocity else "epsilon", source))


def _attention(command: Command, draft: Draft) -> None:
    named = [name for name in ("mem_eff_attn", "xformers", "sdpa") if command.get(name)]
    source = f"--{named[0]}" if named else "sd-scripts names none; the result is the same"
    draft.set("attention", "name", Setting("sdpa", source))


def _training(command: Command, draft: Draft) -> None:
    if command.get("max_train_epochs"):
        if "max_train_steps" in command.given:
            draft.remark("max_train_steps", "has no effect beside --max_train_epochs")
    else:
        draft.set("training", "max_steps", command.setting("max_train_steps"))
    if command.get("seed") is None:
        seed = attrs.fields(TrainingSection).seed.default
        draft.set(
            "training", "seed", Setting(seed, "--seed is absent: sd-scripts draws one, so no two runs are the same")
        )
    else:
        draft.set("training", "seed", command.setting("seed"))


def _saving(command: Command, draft: Draft) -> None:
    precision = PRECISIONS[command.get("save_precision")]
    draft.set("saver", "precision", command.setting("save_precision", precision))
    every_n_epochs, ratio = command.get("save_every_n_epochs"), command.get("save_n_epoch_ratio")
    if ratio and command.get("max_train_epochs"):
        every_n_epochs = max(1, command.get("max_train_epochs") // ratio)
        draft.set("output", "save_every_n_epochs", command.setting("save_n_epoch_ratio", every_n_epochs))
    elif every_n_epochs:
        draft.set("output", "save_every_n_epochs", command.setting("save_every_n_epochs"))
    if ratio and not command.get("max_train_epochs"):
        draft.leave_out("save_n_epoch_ratio", ratio, "it can be counted only with --max_train_epochs")
    _keep_last(command, draft, every_n_epochs)


def _keep_last(command: Command, draft: Draft, every_n_epochs: int | None) -> None:
    """How many saves stay; --save_last_n_steps counts steps, and keeps the save that many steps ago as well."""
    epochs, steps, every = (
        command.get(name) for name in ("save_last_n_epochs", "save_last_n_steps", "save_every_n_steps")
    )
    kept = {}
    if epochs and every_n_epochs:
        kept["save_last_n_epochs"] = epochs
    if steps and every:
        kept["save_last_n_steps"] = steps // every + 1
    for name, value in (("save_last_n_epochs", epochs), ("save_last_n_steps", steps)):
        if value and name not in kept:
            draft.remark(name, "has no effect, as nothing is saved every so many epochs or steps")
    if kept:
        name, count = max(kept.items(), key=lambda item: item[1])
        draft.set("output", "keep_last", command.setting(name, count))
        if len(kept) > 1:
            draft.remark(min(kept, key=lambda item: kept[item]), f"counts with --{name} here: {count} saves are kept")


def _logs(command: Command, draft: Draft) -> None:
    folder, kind = command.get("logging_dir"), command.get("log_with")
    if kind in ("wandb", "all"):
        draft.leave_out("log_with", kind, OPTIONS["wandb_run_name"].later)
    if kind in ("tensorboard", "all") and not folder:
        raise ConfigError([Problem("--log_with", f"{kind} needs --logging_dir")])
    if not folder or kind == "wandb":
        return
    observer = {
        "name": command.setting("logging_dir", "tensorboard"),
        "dir": command.setting("logging_dir", command.path(folder)),
    }
    if command.get("log_prefix"):
        observer["prefix"] = command.setting("log_prefix")
    draft.observers.append(observer)


def _previews(command: Command, draft: Draft) -> None:
    """Previews. Raises ConfigError where there is no prompt file, for which sd-scripts stops in the middle of a run."""
    counts = [name for name in ("sample_every_n_epochs", "sample_every_n_steps") if (command.get(name) or 0) > 0]
    for name in ("sample_every_n_epochs", "sample_every_n_steps"):
        if name in command.given and name not in counts:
            draft.remark(name, f"{command.get(name)} means never")
    asked = [*counts, *(["sample_at_first"] if command.get("sample_at_first") else [])]
    if asked and not command.get("sample_prompts"):
        raise ConfigError([Problem(f"--{asked[0]}", "needs --sample_prompts, the file that says what to draw")])
    if not asked:
        for name in ("sample_prompts", "sample_sampler"):
            if name in command.given:
                draft.remark(name, "has no effect without --sample_every_n_epochs or --sample_every_n_steps")
        return
    if len(counts) == 2:
        draft.remark("sample_every_n_steps", "has no effect beside --sample_every_n_epochs")
        asked.remove("sample_every_n_steps")
    observer = {
        "name": command.setting("sample_prompts", "samples"),
        "prompts": command.setting("sample_prompts", command.path(command.get("sample_prompts"))),
    }
    observer |= {name.removeprefix("sample_"): command.setting(name) for name in asked}
    if "sample_sampler" in command.given:
        observer["sampler"] = command.setting("sample_sampler")
    draft.observers.append(observer)
