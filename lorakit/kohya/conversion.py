"""From the options of sd-scripts to the tables of a config that trains the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

import attrs
from attrs import evolve

from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.checkpoints import locate, summarize
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.sd_scripts_option import Option
from lorakit.config.train_config import TrainingSection
from lorakit.config.training_scripts import SCRIPTS, Script
from lorakit.errors import ConfigError, LorakitError, Problem
from lorakit.kohya.components import write_lr_scheduler, write_optimizer
from lorakit.kohya.datasets import FOLDER_OPTIONS, write_data
from lorakit.kohya.draft import Command, Draft, OptionStatus, Setting, keys_and_choices, target_of
from lorakit.kohya.flow import write_flow
from lorakit.kohya.networks import write_network
from lorakit.kohya.observers import write_observers, write_previews
from lorakit.kohya.options_files import Given, unknown_option
from lorakit.plugins.catalog import Catalog
from lorakit.utils.wording import listed

_ATTENTION = ("attn_mode", "mem_eff_attn", "xformers", "sdpa")
"""Options for the implementation of attention; the first that is given counts."""

_BOUNDS: Mapping[str, str] = {"min_timestep": "min", "max_timestep": "max"}
"""Options with bounds of timesteps, with the keys of `[timesteps]` for them."""

_NOTHING_AT_ZERO = frozenset({"vae_batch_size", "lr_scheduler_num_cycles"})
"""Options with a default for which 0 is no number of anything."""

_MODEL = "pretrained_model_name_or_path"

_CACHES_OF_TEXTS = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")

_VARYING_CAPTIONS = ("shuffle_caption", "caption_dropout_rate", "caption_tag_dropout_rate", "token_warmup_step")
"""Options by which a caption is not always the same, with which sd-scripts caches nothing of it."""

_MULTIRES = ("multires_noise_iterations", "multires_noise_discount")

_PRECISIONS: Mapping[str, str] = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
"""lorakit's names of the number formats of --save_precision."""

_WEIGHTS_OF_A_STATE = ("model.safetensors", "pytorch_model.bin")
"""The files in a state of sd-scripts that the network's weights are in, with the keys of a LoRA file; old ones last."""

_WEIGHT_FILES = (".safetensors", ".ckpt", ".pt", ".bin")


def convert(given: Given, folder: Path, target: Path, catalog: Catalog) -> Draft:
    """The config that trains what the options `given` train when sd-scripts is called in `folder`.

    The config is for a file in `target`. Raises ConfigError for what sd-scripts itself cannot train.
    """
    missing = [Problem(f"--{name}", "is missing") for name in (_MODEL, "output_dir") if not given.options.get(name)]
    if missing:
        raise ConfigError(missing)
    draft = Draft(remarks=[*given.remarks])
    found = _detected(given, folder, catalog)
    script = _script(given, found, draft)
    given = _of_script(given, script, draft)
    family = catalog.find(ModelFamilyConfig, _family(given, script, found))
    keys = keys_and_choices(catalog)
    command = Command(given.options, keys, script, family, folder.absolute(), target.absolute(), given.sources)
    _refuse_combinations(command, draft)
    for option in OPTIONS.values():
        if option.is_of(script):
            _write_option(option, command, draft)
    _model(command, draft)
    if command.get("validation_seed") is not None:
        draft.set("data", "validation_seed", command.setting("validation_seed"))
    write_data(command, draft)
    write_flow(command, draft)
    write_network(command, draft, catalog)
    write_optimizer(command, draft, catalog)
    write_lr_scheduler(command, draft, catalog)
    _base_weights(command, draft)
    attention = next((f"--{name}" for name in _ATTENTION if name in command.given and command.get(name)), "")
    draft.set("attention", "name", Setting("sdpa", attention or "not set in sd-scripts; the result is the same"))
    _training(command, draft)
    _compiling(command, draft)
    _saving(command, draft)
    _resume(command, draft)
    write_observers(command, draft, catalog)
    write_previews(command, draft)
    return draft


def _detected(given: Given, folder: Path, catalog: Catalog) -> DetectedFamily | None:
    """What the base model is, as far as it can be looked at."""
    try:
        return catalog.detect_model_family(summarize(locate(given.options[_MODEL], folder)))
    except (LorakitError, OSError, RuntimeError):  # reported by `check`
        return None


def _script(given: Given, found: DetectedFamily | None, draft: Draft) -> Script:
    """The script that the options are for: as they say, or the one that trains the base model.

    Raises ConfigError where that is another than they say.
    """
    path, said = given.options[_MODEL], _scripts_said(given)
    for script in (*said, *SCRIPTS):
        if found and found.name in script.families:
            if script not in said:
                message = f"{path} is {found.title}, for which sd-scripts has {script.name}, not {said[0].name}"
                raise ConfigError([Problem(f"--{_MODEL}", message)])
            return script
    # Programs write what they have into their files, whatever is trained.
    told = [OPTIONS[name] for name, value in given.options.items() if value != OPTIONS[name].default]
    own = next((script for script in said if all(option.is_of(script) for option in told)), said[0])
    if not found and said == SCRIPTS and own is SCRIPTS[0]:
        message = f"{path} cannot be looked at, so the options are taken for those of {SCRIPTS[0].name}"
        others = ", ".join(script.name for script in SCRIPTS[1:])
        draft.note(_MODEL, f"{message}; for other models, write the name of their script before them: {others}")
    return own


def _scripts_said(given: Given) -> tuple[Script, ...]:
    """The scripts that options may be for: the one that is named, or those that have what was given.

    Raises ConfigError for options of which no script has all.
    """
    if given.script:
        return (given.script,)
    own = {name: OPTIONS[name] for name in given.options if OPTIONS[name].scripts}
    typed = [option for name, option in own.items() if name not in given.sources]
    module = given.options.get("network_module")
    by_module = tuple(script for script in SCRIPTS[2:] if script.network_module == module)
    said = tuple(script for script in by_module or SCRIPTS if all(option.is_of(script) for option in typed))
    if not said and by_module:
        foreign = [option.name for option in typed if not option.is_of(by_module[0])]
        raise ConfigError([unknown_option(name, script=by_module[0]) for name in foreign])
    if not said:
        names = listed([f"--{option.name}" for option in typed])
        raise ConfigError([Problem(names, "are options of different scripts", "name the script before them")])
    return said


def _of_script(given: Given, script: Script, draft: Draft) -> Given:
    """The options without those that the script does not have, which are those of files for several scripts."""
    foreign = [name for name in given.options if not OPTIONS[name].is_of(script)]
    told = [name for name in foreign if given.options[name] != OPTIONS[name].default]
    if told:
        names = ", ".join(given.sources.get(name, name).removeprefix("--") for name in told)
        draft.remarks.append(Problem(names, f"ignored, as in {script.name}"))
    return evolve(given, options={name: value for name, value in given.options.items() if name not in foreign})


def _family(given: Given, script: Script, found: DetectedFamily | None) -> str:
    """The family that the options say is trained. Raises ConfigError where the base model is of another."""
    chosen = str(given.options.get("model_type", ""))
    name = chosen if chosen in script.families else script.families[0]
    if script.is_flow and found and found.name != name:
        hint = "leave it out" if found.name == script.families[0] else f"--model_type={found.name}"
        message = f"is {chosen}, and" if chosen else "is absent, and"
        raise ConfigError([Problem("--model_type", f"{message} {given.options[_MODEL]} is {found.title}", hint)])
    return name


def _refuse_combinations(command: Command, draft: Draft) -> None:
    """Raise ConfigError for what the script stops at, other than for numbers; note what lorakit does all the same."""
    script = command.script
    if command.get("v2") and "sd2" not in script.families:
        raise ConfigError([Problem("--v2", f"cannot be used with {script.name}", "remove it")])
    caches = [name for name in _CACHES_OF_TEXTS if command.get(name)]
    if caches and not (script.caches_beside_training or command.get("network_train_unet_only")):
        hint = "add that; or remove this, to train the text encoders as well"
        raise ConfigError([Problem(f"--{caches[0]}", "cannot be used without --network_train_unet_only", hint)])
    allowed = ("caption_dropout_rate",) if script.drops_cached_captions else ()
    varying = [f"--{name}" for name in _VARYING_CAPTIONS if command.get(name) and name not in allowed and caches]
    if varying:
        message = f"is refused by {script.name} with {', '.join(varying)}; lorakit trains, and encodes captions of many"
        draft.note(caches[0], f"{message} forms in each step")


def _write_option(option: Option, command: Command, draft: Draft) -> None:
    """Copy an option, or say why it is not in the config."""
    value, has_key = command.get(option.name), command.has_key(option.key.partition(" = ")[0])
    if has_key and option.name not in command.script.ignores:
        _write_plainly(option, command, draft)
    elif option.name not in command.given or value in (option.default, command.keys.get(option.key), None, 0):
        return
    elif option.name in command.script.ignores:
        if option.name == "max_timestep" and value == 1000:  # where all timesteps end
            return
        hint = ""
        if option.name in _BOUNDS:
            hint = f"; timesteps.{_BOUNDS[option.name]} = {value / 1000:g} does what it says"
        draft.note(option.name, f"has no effect, as with {command.script.name}{hint}")
    elif not option.special:
        draft.mark_unsupported(option.name, value, f"{command.family.title or command.family.name} needs none")


def _write_plainly(option: Option, command: Command, draft: Draft) -> None:
    """Copy an option that needs no more, or note that it has no counterpart."""
    value = command.get(option.name)
    is_given = option.name in command.given and value != option.default
    state = command.state(option.name)
    if option.name in FOLDER_OPTIONS and command.get("dataset_config"):
        return
    is_told = option.special and not option.key  # where it is converted
    if state is OptionStatus.UNSUPPORTED and is_given and value not in (0, "", []) and not is_told:
        draft.mark_unsupported(option.name, value, option.later)
    if state is not OptionStatus.WORKS or option.special:
        return
    section, key, flag_value = target_of(option)
    default = command.default_of(f"{section}.{key}")
    if option.kind == "flag" and option.key.endswith(("]", '"', "true")):
        if value:
            parts = command.parts(flag_value) if isinstance(flag_value, list) else flag_value
            draft.set(section, key, command.setting(option.name, parts))
        return
    # sd-scripts switches these off with zero or an empty text; lorakit by leaving the key out.
    is_off = not value and (value is None or default is None or option.name in _NOTHING_AT_ZERO)
    if option.name in _MULTIRES:  # with either at 0 the noise is ordinary noise
        is_zero = any(name in command.given and not command.get(name) for name in _MULTIRES)
        is_off = is_zero or not (command.is_typed(option.name) or all(map(command.get, _MULTIRES)))
    if not is_off and (command.is_typed(option.name) or value != default):
        if option.kind == "path":
            value = command.model_path(value) if option.name == "vae" else command.path(value)
        draft.set(section, key, command.setting(option.name, value))


def _model(command: Command, draft: Draft) -> None:
    draft.set("model", "path", command.setting(_MODEL, command.model_path(command.get(_MODEL))))
    if len(command.script.families) == 1 or command.script.is_flow:
        is_said = command.given.get("model_type") == command.family.name
        source = "--model_type" if is_said else command.script.name
        draft.set("model", "family", Setting(command.family.name, source))
    if command.has_key("model.fix_text"):
        draft.set("model", "fix_text", Setting(value=True, source="sd-scripts cleans captions with ftfy"))
    if command.has_key("model.prediction") and command.state("v_parameterization") is OptionStatus.WORKS:
        is_velocity = command.get("v_parameterization")
        source = "--v_parameterization" + ("" if is_velocity else " is absent")
        draft.set("model", "prediction", Setting("v_prediction" if is_velocity else "epsilon", source))
        if is_velocity:  # for which the model's files would decide in lorakit
            draft.set("loss", "zero_terminal_snr", command.setting("zero_terminal_snr"))


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
    names = [("torch_compile", "dynamo_backend"), ("compile", "compile_backend")]
    own = [(flag, backend) for flag, backend in names if OPTIONS[flag].is_of(command.script)]
    switched = [flag for flag, _ in own if command.get(flag)]
    if len(switched) > 1:
        raise ConfigError([Problem(f"--{switched[0]}", f"cannot be combined with --{switched[1]}")])
    for flag, backend in own:
        if flag not in switched:
            if command.is_typed(backend):
                draft.note(backend, f"has no effect without --{flag}")
        elif command.get(backend) == "no":
            draft.note(flag, f"has no effect with --{backend}=no")
        else:
            draft.set("training", "compile", command.setting(flag))
            if backend in command.given:
                draft.set("training", "compile_backend", command.setting(backend))


def _saving(command: Command, draft: Draft) -> None:
    """[saver], and those keys of [output] and [metadata] that several options, or other values, become."""
    precision = _PRECISIONS[command.get("save_precision")]
    draft.set("saver", "name", command.setting("save_model_as"))
    draft.set("saver", "precision", command.setting("save_precision", precision))
    if command.get("save_every_n_epochs") and not command.get("save_n_epoch_ratio"):
        draft.set("output", "save_every_n_epochs", command.setting("save_every_n_epochs"))
    _keep_last(command, draft, "keep_last", "")
    _keep_last(command, draft, "keep_last_states", "_state")
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
    """The weights of a state, which win over --network_weights as they do with sd-scripts.

    Raises ConfigError for a file in place of the folder of a state, and for states that are not sd-scripts'.
    """
    state = command.get("resume")
    if not state:
        return
    if command.get("resume_from_huggingface"):
        draft.mark_unsupported(
            "resume", state, "the state is on the Hub: download it with `hf download`, and give its folder"
        )
        return
    folder = command.on_disk(state)
    if PureWindowsPath(state).suffix.lower() in _WEIGHT_FILES or folder.is_file():
        is_of_state = PureWindowsPath(state).name in _WEIGHTS_OF_A_STATE
        parent = os.path.dirname(state) or "."  # noqa: PTH120 - keeps the path as it was typed
        hint = f"--resume={parent}" if is_of_state else f"to start from a LoRA file: --network_weights={state}"
        raise ConfigError([Problem("--resume", f"must be the folder of a state, not a file: {state}", hint)])
    if (folder / "state.json").is_file() or any(folder.glob("step*/state.json")):
        hint = f"lorakit train CONFIG --resume={state}"
        raise ConfigError([Problem("--resume", f"{state} is a state of lorakit, not of sd-scripts", hint)])
    names = [name for name in _WEIGHTS_OF_A_STATE if (folder / name).is_file()]
    file = f"{state.rstrip('/')}/{(names or _WEIGHTS_OF_A_STATE)[0]}"
    draft.set("network", "weights", command.setting("resume", command.path(file)))
    draft.note("resume", "loads only the weights: optimizer and schedule start over at the first step")
    if command.get("network_weights"):
        draft.note("network_weights", "has no effect with --resume")
