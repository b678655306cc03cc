"""The `.json` files of the kohya_ss GUI, its presets and what it saves beside a LoRA, as options of sd-scripts.

The keys are the names of the GUI's fields, and the fields of all its models and of `accelerate` stand among them.
Older files hold numbers as texts, and fields that are not filled in as empty ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.training_scripts import MODELS, SDXL_TRAIN_NETWORK, TRAIN_NETWORK, Script
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.options_files import UNSAID, Given, take

Parse = Callable[[str, Script], dict[str, Any]]
"""From a line of options of a script to their values."""

_MODELS: Mapping[str, str] = {
    "flux1_checkbox": "FLUX",
    "sd3_checkbox": "Stable Diffusion 3",
    "hunyuan_image_checkbox": "HunyuanImage",
    "anima_checkbox": "Anima",
    "lumina_checkbox": "Lumina",
}
"""Fields that say that another model than Stable Diffusion is trained."""

_RENAMED: Mapping[str, str] = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "lora_network_weights": "network_weights",
}
"""Fields that are called otherwise than the option."""

_NOT_PASSED_ON = frozenset({
    "additional_parameters", "cpu_offload_checkpointing", "disable_mmap_load_safetensors", "dynamo_backend",
    "fp8_base_unet", "fused_backward_pass", "lr_warmup_steps", "mem_eff_save", "no_half_vae", "sdpa", "seed",
    "text_encoder_lr", "unet_lr", "xformers",
})  # fmt: skip
"""Fields that are no options, or that the GUI passes on for other models alone or in another form."""

_SDXL_FLAGS: Mapping[str, str] = {
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
}
"""Fields that count for SDXL alone, with the option that each sets."""

_BY_NOISE_TYPE: Mapping[str, tuple[str, ...]] = {
    "Original": ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"),
    "Multires": ("multires_noise_iterations", "multires_noise_discount"),
}
"""Fields of noise, of which those of the chosen type count."""

_LORA_FIELDS = (
    "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "block_dims", "block_alphas",
    "conv_block_dims", "conv_block_alphas", "rank_dropout", "module_dropout",
)  # fmt: skip
_LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_LYCORIS_FIELDS = ("rank_dropout", "module_dropout", "use_tucker", "rank_dropout_scale", "train_norm")
_LYCORIS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "LoCon": ("locon", (*_LYCORIS_FIELDS, "bypass_mode", "dora_wd", "use_scalar")),
    "LoHa": ("loha", (*_LYCORIS_FIELDS, "bypass_mode", "dora_wd", "use_scalar")),
    "LoKr": ("lokr", (*_LYCORIS_FIELDS, "bypass_mode", "dora_wd", "use_scalar", "factor", "use_cp", "decompose_both")),
    "iA3": ("ia3", ("train_on_input",)),
    "DyLoRA": ("dylora", (*_LYCORIS_FIELDS, "unit")),
    "GLoRA": ("glora", _LYCORIS_FIELDS),
    "Diag-OFT": ("diag-oft", (*_LYCORIS_FIELDS, "constrain", "rescaled")),
    "BOFT": ("boft", _LYCORIS_FIELDS),
    "Native Fine-Tuning": ("full", ("rank_dropout", "module_dropout", "rank_dropout_scale", "train_norm")),
}
"""The GUI's types of LyCORIS: the algorithm, and the fields that it takes."""

_ARGUMENT_NAMES: Mapping[str, str] = {"constrain": "constraint", "unit": "block_size"}
"""Arguments of LyCORIS with another name than the field."""

_OWN_MODULES: Mapping[str, str] = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "Kohya DyLoRA": "networks.dylora",
    "Kohya LoHa": "networks.loha",
    "Kohya LoKr": "networks.lokr",
    "LoRA-FA": "networks.lora_fa",
}
"""The GUI's types of LoRA that are modules of sd-scripts."""

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

    Raises ConfigError for files of other models than Stable Diffusion, and for values of the wrong type.
    """
    for field, model in _MODELS.items():
        if _number(fields, field):
            hint = f"{MODELS}; of the GUI's files for the last three, give the .toml that it makes when a run starts"
            raise ConfigError([Problem(f"{file}: {field}", f"is set, so the file is for {model}", hint)])
    script = SDXL_TRAIN_NETWORK if _number(fields, "sdxl") else TRAIN_NETWORK
    values = {name: value for name, value in _values(fields).items() if OPTIONS[name].is_of(script)}
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    sources = {}
    for name, (field, value) in values.items():
        take(name, value, f"{file}: {field}", found, problems)
        sources[name] = field
    remarks = list(_remarks(file, fields))
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


def _values(fields: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The fields as options: by the option's name, what the field is called and what it holds."""
    values = {
        _RENAMED.get(field, field): (field, value)
        for field, value in fields.items()
        if _RENAMED.get(field, field) in OPTIONS and field not in _NOT_PASSED_ON
    }
    noise = fields.get("noise_offset_type")
    for type_, names in _BY_NOISE_TYPE.items():
        if noise and noise != type_:
            values = {name: value for name, value in values.items() if name not in names}
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
    return values | _of_sdxl(fields) | _length(fields) | _rates(fields) | _network(fields)


def _of_sdxl(fields: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The flags that the GUI sets for SDXL alone."""
    is_xl = _number(fields, "sdxl")
    return {name: (field, True) for field, name in _SDXL_FLAGS.items() if is_xl and _number(fields, field)}


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


def _rates(fields: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Learning rates of the parts; a part whose rate is 0 is not trained, but with both at 0 there is one for both."""
    unet, text_encoder = (_number(fields, name) for name in ("unet_lr", "text_encoder_lr"))
    values: dict[str, tuple[str, Any]] = {}
    if unet:
        values["unet_lr"] = ("unet_lr", unet)
    if text_encoder:
        values["text_encoder_lr"] = ("text_encoder_lr", [text_encoder])
    if "text_encoder_lr" in fields and "unet_lr" in fields and bool(unet) != bool(text_encoder):
        name, field = ("unet", "text_encoder_lr") if unet else ("text_encoder", "unet_lr")
        values[f"network_train_{name}_only"] = (f"{field} is 0", True)
    return values


def _network(fields: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The network module and its arguments."""
    type_ = str(fields.get("LoRA_type", "Standard"))
    type_ = "LyCORIS/LoCon" if type_ == "LoCon" else type_
    args: list[str]
    if type_.removeprefix("LyCORIS/") in _LYCORIS and type_.startswith("LyCORIS/"):
        algorithm, names = _LYCORIS[type_.removeprefix("LyCORIS/")]
        module, sizes = "lycoris.kohya", () if algorithm == "full" else ("conv_dim", "conv_alpha")
        args = [f"algo={algorithm}", f"preset={fields.get('LyCORIS_preset') or 'full'}"]
        args += [f"{name}={_short(fields.get(name, 1))}" for name in sizes]
    elif type_ in _OWN_MODULES:
        module, names = _OWN_MODULES[type_], _LORA_FIELDS
        has_convolutions = type_ not in ("Standard", "LoRA-FA")
        args = [f"{name}={_short(fields.get(name, 1))}" for name in ("conv_dim", "conv_alpha") if has_convolutions]
        names += ("unit",) if type_ == "Kohya DyLoRA" else ()
        names += ("factor", "use_tucker") if type_ in ("Kohya LoHa", "Kohya LoKr") else ()
    else:
        raise ConfigError([Problem("LoRA_type", f"{type_!r} is for another model, or unknown")])
    for name in (*names, *_LORA_PLUS):
        value = fields.get(name)
        is_off = value in (None, "", False, 0, "0", "False") or (name == "factor" and value == -1)
        if not is_off:
            called = _ARGUMENT_NAMES.get(name, name) if module == "lycoris.kohya" else name
            args.append(f"{called}={_short(value)}")
    return {"network_module": ("LoRA_type", module), "network_args": ("LoRA_type", args)}


def _short(value: Any) -> Any:
    """A number without the `.0` that a slider leaves."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(fields: Mapping[str, Any], name: str) -> float:
    """The number in a field, 0 if absent."""
    value = fields.get(name)
    try:
        return float(value) if value is not None else 0.0
    except (TypeError, ValueError):
        return float(str(value).lower() == "true")


def _remarks(file: str, fields: Mapping[str, Any]) -> list[Problem]:
    """What the config does not do, of what fields ask for."""
    found = []
    if _number(fields, "stop_text_encoder_training") or _number(fields, "stop_text_encoder_training_pct"):
        found.append(Problem(f"{file}: stop_text_encoder_training", "has no effect, as in the GUI itself"))
    if _number(fields, "train_inpainting"):
        message = "is ignored: lorakit does not train inpainting models"
        found.append(Problem(f"{file}: train_inpainting", message))
    if _number(fields, "num_processes") > 1 or _number(fields, "multi_gpu"):
        processes = max(2, _short(_number(fields, "num_processes")))
        hint = f"accelerate launch --num_processes {processes} -m lorakit train CONFIG"
        found.append(Problem(f"{file}: num_processes", "is not part of a config", hint))
    if isinstance(fields.get("seed"), Mapping | list):
        found.append(Problem(f"{file}: seed", "is not a number and is ignored"))
    backend = fields.get("dynamo_backend")
    if isinstance(backend, str) and backend not in ("", "no", "No"):
        hint = f'training.compile = true, training.compile_backend = "{backend}"'
        found.append(Problem(f"{file}: dynamo_backend", "is an option of accelerate and is ignored", hint))
    return found
