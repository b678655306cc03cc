"""The `.json` files of the kohya_ss GUI, its presets and what it saves beside a LoRA, as options of sd-scripts.

The keys are the names of the GUI's fields, and the fields of all its models and of `accelerate` stand among them.
Older files hold numbers as texts, and fields that are not filled in as empty ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.training_scripts import (
    ANIMA_TRAIN_NETWORK,
    FLUX_TRAIN_NETWORK,
    MODELS,
    SDXL_TRAIN_NETWORK,
    TRAIN_NETWORK,
    Script,
)
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.gui_networks import network_of, short
from lorakit.kohya.options_files import UNSAID, Given, take

Parse = Callable[[str, Script], dict[str, Any]]
"""From a line of options of a script to their values."""

_SCRIPTS: Mapping[str, tuple[Script, str]] = {
    "sdxl": (SDXL_TRAIN_NETWORK, "sdxl_"),
    "flux1_checkbox": (FLUX_TRAIN_NETWORK, "flux1_"),
    "anima_checkbox": (ANIMA_TRAIN_NETWORK, "anima_"),
}
"""Fields that say which model is trained: its script, and what the names of fields for it alone begin with."""

_OTHER_MODELS: Mapping[str, str] = {
    "sd3_checkbox": "Stable Diffusion 3",
    "hunyuan_image_checkbox": "HunyuanImage",
    "lumina_checkbox": "Lumina",
}
"""Fields that say that a model is trained that lorakit does not have."""

_RENAMED: Mapping[str, str] = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "lora_network_weights": "network_weights",
}
"""Fields that are called otherwise than the option."""

_NOT_PASSED_ON = frozenset({
    "additional_parameters", "disable_mmap_load_safetensors", "dynamo_backend", "fused_backward_pass", "logit_mean",
    "logit_std", "lr_warmup_steps", "mem_eff_save", "mode_scale", "no_half_vae", "sdpa", "seed",
    "text_encoder_batch_size", "text_encoder_lr", "unet_lr", "weighting_scheme", "xformers",
})  # fmt: skip
"""Fields that are no options, or that the GUI passes on for other models alone or in another form."""

_FLUX_ONLY = frozenset({
    "cpu_offload_checkpointing", "discrete_flow_shift", "fp8_base_unet", "show_timesteps", "timestep_sampling",
})  # fmt: skip
"""Fields that the GUI passes on for FLUX.1 alone, though other scripts have the options."""

_OLD_SWAPS = ("single_blocks_to_swap", "double_blocks_to_swap")
"""Fields of `--blocks_to_swap` in older versions."""

_OF_CLIP = frozenset({"clip_skip", "max_token_length", "sample_sampler"})
_UNUSED: Mapping[Script, frozenset[str]] = {FLUX_TRAIN_NETWORK: _OF_CLIP, ANIMA_TRAIN_NETWORK: _OF_CLIP | {"vae"}}
"""Fields that the GUI has values in and does not pass on for these scripts, or that they do not look at."""

_BY_NOISE_TYPE: Mapping[str, tuple[str, ...]] = {
    "Original": ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"),
    "Multires": ("multires_noise_iterations", "multires_noise_discount"),
}
"""Fields of noise, of which those of the chosen type count."""

_NEEDED: Mapping[str, tuple[str, str]] = {
    "pretrained_model_name_or_path": ("path/to/model.safetensors", "the base model"),
    "train_data_dir": ("path/to/images", "the images"),
    "output_dir": ("out", "the output folder"),
}
"""What a preset leaves to the user: what is written in its place, and what it is."""


def is_gui_file(fields: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a file of the GUI's tab for LoRA; those of its other tabs know no rank."""
    return "LoRA_type" in fields or {"network_dim", "max_resolution"} <= fields.keys()


def what_it_trains(fields: Mapping[str, Any]) -> str:
    """What a JSON object that is no such file trains, where it is one of another tab of the GUI."""
    if {"num_vectors_per_token", "init_word"} & fields.keys():
        return "an embedding (textual inversion)"
    return "the whole model (DreamBooth or fine-tuning)" if {"max_resolution", "optimizer"} <= fields.keys() else ""


def read_gui_file(file: str, fields: Mapping[str, Any], typed: Mapping[str, Any], parse: Parse) -> Given:
    """The options that the GUI calls a script of sd-scripts with; `typed` are those that stand after the file.

    Raises ConfigError for files of models that lorakit does not have, and for values of the wrong type.
    """
    for field, model in _OTHER_MODELS.items():
        if _number(fields, field):
            raise ConfigError([Problem(f"{file}: {field}", f"is set, so the file is for {model}", MODELS)])
    script, prefix = next((own for field, own in _SCRIPTS.items() if _number(fields, field)), (TRAIN_NETWORK, ""))
    values = {name: value for name, value in _values(fields, script, prefix).items() if OPTIONS[name].is_of(script)}
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    sources = {}
    for name, (field, value) in values.items():
        take(name, value, f"{file}: {field}", found, problems)
        sources[name] = field
    remarks = list(_remarks(file, fields, script))
    text = fields.get("additional_parameters")
    if isinstance(text, str) and text.strip():
        try:
            found |= parse(text, script)
        except ConfigError as error:
            problems += [Problem(f"{file}: additional_parameters", str(problem)) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    missing = [name for name in _NEEDED if name not in found and name not in typed]
    if "dataset_config" in {*found, *typed}:
        missing = [name for name in missing if name != "train_data_dir"]
    for name in missing:
        found[name], sources[name] = _NEEDED[name][0], UNSAID
    if missing:
        cures = " ".join(f"--{name}=…" for name in missing)
        what = ", ".join(_NEEDED[name][1] for name in missing)
        remarks.append(Problem(file, f"does not set {what}", f"set it in the config, or add {cures} after the file"))
    return Given(found, {name: sources.get(name, "additional_parameters") for name in found}, tuple(remarks), script)


def _values(fields: Mapping[str, Any], script: Script, prefix: str) -> dict[str, tuple[str, Any]]:
    """The fields as options: by the option's name, what the field is called and what it holds."""
    values = _named_alike(fields, script)
    for name in ("optimizer_args", "lr_scheduler_args"):
        if isinstance(fields.get(name), str):
            values[name] = (name, fields[name].replace('"', "").split())
    if not fields.get("optimizer") and _number(fields, "use_8bit_adam"):
        values["optimizer_type"] = ("use_8bit_adam", "AdamW8bit")
    values.pop("use_8bit_adam", None)
    if str(fields.get("use_wandb")).lower() == "true":
        values["log_with"] = ("use_wandb", "wandb")
    attention = fields.get("xformers")
    if attention in (True, "xformers", "sdpa"):
        values["sdpa" if attention == "sdpa" else "xformers"] = ("xformers", True)
    if _number(fields, "seed"):
        values["seed"] = ("seed", fields["seed"])
    module, args = network_of(fields, script)
    values["network_module"], values["network_args"] = ("LoRA_type", module), ("LoRA_type", args)
    return values | _of_model(fields, prefix) | _length(fields) | _rates(fields, script)


def _named_alike(fields: Mapping[str, Any], script: Script) -> dict[str, tuple[str, Any]]:
    """The fields that are called as an option, or nearly, without those that do not count for the script."""
    left_out = {*_NOT_PASSED_ON, *_UNUSED.get(script, ()), *(() if script is FLUX_TRAIN_NETWORK else _FLUX_ONLY)}
    left_out |= {"clip_l"} if fields.get("model_type") == "chroma" else set()
    noise = fields.get("noise_offset_type")
    for type_, names in _BY_NOISE_TYPE.items():
        left_out |= {*names} if noise and noise != type_ else set()
    renamed = dict(_RENAMED)
    if script is FLUX_TRAIN_NETWORK and not _number(fields, "blocks_to_swap"):
        renamed |= {field: "blocks_to_swap" for field in _OLD_SWAPS if _number(fields, field)}
    called = {field: renamed.get(field, field) for field in fields if field not in left_out}
    return {name: (field, fields[field]) for field, name in called.items() if name in OPTIONS}


def _of_model(fields: Mapping[str, Any], prefix: str) -> dict[str, tuple[str, Any]]:
    """The fields of the model that is trained, whose names begin with `prefix`."""
    own = {field.removeprefix(prefix): (field, value) for field, value in fields.items() if field.startswith(prefix)}
    values = {name: value for name, value in own.items() if prefix and name in OPTIONS}
    if not _number(fields, f"{prefix}compile"):
        values = {name: value for name, value in values.items() if not name.startswith("compile_")}
    return {name: value for name, value in values.items() if value[1] != "auto"}  # which stands for an absent option


def _length(fields: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """How long to train, where neither steps nor epochs of sd-scripts say it: the GUI makes steps of its epochs."""
    values: dict[str, tuple[str, Any]] = {}
    is_said = _number(fields, "max_train_epochs") or _number(fields, "max_train_steps") or fields.get("dataset_config")
    if not is_said and _number(fields, "epoch"):
        values["max_train_epochs"] = ("epoch", fields["epoch"])
    if not _number(fields, "max_train_steps"):
        values["max_train_steps"] = ("max_train_steps", None)
    if _number(fields, "lr_warmup_steps"):
        values["lr_warmup_steps"] = ("lr_warmup_steps", fields["lr_warmup_steps"])
    elif _number(fields, "lr_warmup"):
        values["lr_warmup_steps"] = ("lr_warmup", f"{_number(fields, 'lr_warmup'):g}%")
    cycles = fields.get("lr_scheduler_num_cycles")
    if cycles == "" and _number(fields, "epoch"):
        values["lr_scheduler_num_cycles"] = ("epoch", fields["epoch"])
    return values


def _rates(fields: Mapping[str, Any], script: Script) -> dict[str, tuple[str, Any]]:
    """Learning rates of the parts; a part whose rate is 0 is not trained, but with both at 0 there is one for both.

    Raises ConfigError for a rate of T5 without one of CLIP, at which the GUI stops.
    """
    unet, text_encoder = (_number(fields, name) for name in ("unet_lr", "text_encoder_lr"))
    values: dict[str, tuple[str, Any]] = {}
    if unet:
        values["unet_lr"] = ("unet_lr", unet)
    t5 = _number(fields, "t5xxl_lr") if script is FLUX_TRAIN_NETWORK else 0.0
    if t5 and not text_encoder:
        raise ConfigError([Problem("t5xxl_lr", "is set, and text_encoder_lr is 0, at which the GUI stops")])
    if text_encoder:
        values["text_encoder_lr"] = ("text_encoder_lr", [text_encoder, t5] if t5 else [text_encoder])
    if "text_encoder_lr" in fields and "unet_lr" in fields and bool(unet) != bool(text_encoder):
        name, field = ("unet", "text_encoder_lr") if unet else ("text_encoder", "unet_lr")
        values[f"network_train_{name}_only"] = (f"{field} is 0", True)
    return values


def _number(fields: Mapping[str, Any], name: str) -> float:
    """The number in a field, 0 if absent."""
    value = fields.get(name)
    try:
        return float(value) if value is not None else 0.0
    except (TypeError, ValueError):
        return float(str(value).lower() == "true")


def _remarks(file: str, fields: Mapping[str, Any], script: Script) -> list[Problem]:
    """What the config does not do, of what fields ask for."""
    found = []
    if _number(fields, "stop_text_encoder_training") or _number(fields, "stop_text_encoder_training_pct"):
        found.append(Problem(f"{file}: stop_text_encoder_training", "has no effect, as in the GUI itself"))
    chooses = fields.get("train_blocks") in ("single", "double") and not _number(fields, "split_mode")
    if script is FLUX_TRAIN_NETWORK and chooses:
        hint = "in the config: network.group_ranks, with 0 for the other group"
        found.append(Problem(f"{file}: train_blocks", "has no effect, as in the GUI itself", hint))
    if _number(fields, "train_inpainting"):
        message = "is ignored: lorakit does not train inpainting models"
        found.append(Problem(f"{file}: train_inpainting", message))
    if _number(fields, "num_processes") > 1 or _number(fields, "multi_gpu"):
        processes = max(2, short(_number(fields, "num_processes")))
        hint = f"accelerate launch --num_processes {processes} -m lorakit train CONFIG"
        found.append(Problem(f"{file}: num_processes", "is not part of a config", hint))
    if isinstance(fields.get("seed"), Mapping | list):
        found.append(Problem(f"{file}: seed", "is not a number and is ignored"))
    backend = fields.get("dynamo_backend")
    if isinstance(backend, str) and backend not in ("", "no", "No"):
        hint = f'training.compile = true, training.compile_backend = "{backend}"'
        found.append(Problem(f"{file}: dynamo_backend", "is an option of accelerate and is ignored", hint))
    return found
