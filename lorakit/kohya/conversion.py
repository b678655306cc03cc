"""From the options of `train_network.py` to the tables of a config that trains the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from lorakit.config.load import config_from_tables
from lorakit.config.sd_scripts import OPTIONS, Option
from lorakit.config.train_config import TrainingSection
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.components import write_lr_scheduler, write_optimizer
from lorakit.kohya.datasets import FOLDER_OPTIONS, write_data
from lorakit.kohya.draft import Command, Draft, Setting
from lorakit.kohya.networks import write_network
from lorakit.kohya.observers import write_observers
from lorakit.kohya.option_status import OptionStatus, known_keys, target_of
from lorakit.kohya.options_files import Given
from lorakit.kohya.previews import write_previews
from lorakit.kohya.saving import write_saving
from lorakit.plugins.catalog import Catalog

_NOTHING_AT_ZERO = frozenset({"vae_batch_size", "lr_scheduler_num_cycles"})
"""Options with a default for which 0 is no number of anything."""

_MULTIRES = ("multires_noise_iterations", "multires_noise_discount")


def convert(given: Given, folder: Path, target: Path, catalog: Catalog) -> Draft:
    """The config that trains what the options `given` train when sd-scripts is called in `folder`.

    The config is for a file in `target`. Raises ConfigError for what sd-scripts itself cannot train.
    """
    command = Command(given.options, known_keys(catalog), folder.absolute(), target.absolute(), given.sources)
    _refuse_missing(command)
    draft = Draft(remarks=[*given.remarks])
    for option in OPTIONS.values():
        _write_plainly(option, command, draft)
    _model(command, draft)
    if command.get("validation_seed") is not None:
        draft.set("data", "validation_seed", command.setting("validation_seed"))
    write_data(command, draft)
    write_network(command, draft, catalog)
    write_optimizer(command, draft, catalog)
    write_lr_scheduler(command, draft, catalog)
    _base_weights(command, draft)
    _attention(command, draft)
    _training(command, draft)
    _compiling(command, draft)
    write_saving(command, draft)
    write_observers(command, draft, catalog)
    write_previews(command, draft)
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
    if state is OptionStatus.UNSUPPORTED and is_given and value not in (0, "", []):
        draft.mark_unsupported(option.name, value, option.later)
    if state is not OptionStatus.WORKS or option.special:
        return
    section, key, flag_value = target_of(option)
    default = command.keys[option.key.partition(" = ")[0]]
    if option.kind == "flag" and option.key.endswith(("]", '"', "true")):
        if value:
            draft.set(section, key, command.setting(option.name, flag_value))
        return
    # Zero, and an empty text, are how sd-scripts is told not to use what lorakit is told by leaving a key out.
    is_off = not value and (value is None or default is None or option.name in _NOTHING_AT_ZERO)
    if option.name in _MULTIRES:  # with either at 0 the noise is ordinary noise
        is_zero = any(name in command.given and not command.get(name) for name in _MULTIRES)
        is_off = is_zero or not (command.is_typed(option.name) or all(map(command.get, _MULTIRES)))
    if not is_off and (command.is_typed(option.name) or value != default):
        draft.set(section, key, command.setting(option.name, _copied(option, value, command)))


def _copied(option: Option, value: Any, command: Command) -> Any:
    if option.name == "vae":
        return command.model_path(value)
    return command.path(value) if option.kind == "path" else value


def _model(command: Command, draft: Draft) -> None:
    name = "pretrained_model_name_or_path"
    draft.set("model", "path", command.setting(name, command.model_path(command.get(name))))
    if command.state("v_parameterization") is OptionStatus.WORKS:
        is_velocity = command.get("v_parameterization")
        source = "--v_parameterization" + ("" if is_velocity else " is absent")
        draft.set("model", "prediction", Setting("v_prediction" if is_velocity else "epsilon", source))


def _base_weights(command: Command, draft: Draft) -> None:
    """LoRA files to merge; sd-scripts merges those for which there is no number with 1, and leaves numbers over."""
    if command.state("base_weights") is not OptionStatus.WORKS:
        return
    paths, multipliers = command.get("base_weights"), command.get("base_weights_multiplier")
    if paths:
        draft.set("model", "base_weights", command.setting("base_weights", [command.path(path) for path in paths]))
    used, left = list(multipliers[: len(paths)]), multipliers[len(paths) :]
    if used:
        draft.set("model", "base_weights_multipliers", command.setting("base_weights_multiplier", used))
    if left:
        numbers = " ".join(f"{number:g}" for number in left)
        draft.note("base_weights_multiplier", f"{numbers} has no effect, as there are no more files in --base_weights")


def _attention(command: Command, draft: Draft) -> None:
    named = [name for name in ("mem_eff_attn", "xformers", "sdpa") if command.get(name)]
    source = f"--{named[0]}" if named else "not set in sd-scripts; the result is the same"
    draft.set("attention", "name", Setting("sdpa", source))


def _training(command: Command, draft: Draft) -> None:
    if command.get("max_train_epochs"):
        if command.is_typed("max_train_steps"):
            draft.note("max_train_steps", "has no effect with --max_train_epochs")
    elif command.get("max_train_steps"):
        draft.set("training", "max_steps", command.setting("max_train_steps"))
    else:
        source = "--max_train_steps is 0, this is its default"
        draft.set("training", "max_steps", Setting(OPTIONS["max_train_steps"].default, source))
    if command.get("seed") is None:
        seed = attrs.fields(TrainingSection).seed.default
        draft.set("training", "seed", Setting(seed, "--seed is absent: sd-scripts draws a random one"))
    else:
        draft.set("training", "seed", command.setting("seed"))


def _compiling(command: Command, draft: Draft) -> None:
    backend = command.get("dynamo_backend")
    if not command.get("torch_compile"):
        if command.is_typed("dynamo_backend"):
            draft.note("dynamo_backend", "has no effect without --torch_compile")
    elif backend == "no":
        draft.note("torch_compile", "has no effect with --dynamo_backend=no")
    else:
        draft.set("training", "compile", command.setting("torch_compile"))
        if "dynamo_backend" in command.given:
            draft.set("training", "compile_backend", command.setting("dynamo_backend"))
