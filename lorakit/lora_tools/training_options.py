"""From the metadata of a LoRA file to the options of sd-scripts, and keys of lorakit, that repeat its training."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from lorakit.api.network_metadata import LORA_MODULE, LYCORIS_MODULE, NETWORK_ARG_KEYS
from lorakit.checkpoints.lora_names import DOWN
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.sd_scripts_option import Option
from lorakit.config.training_scripts import SCRIPTS, TRAIN_NETWORK, Script
from lorakit.errors import AdapterError
from lorakit.lora_tools.adapters import LoRAFile, family_of
from lorakit.lora_tools.metadata import json_object

_KEYS = {
    "pretrained_model_name_or_path": "ss_sd_model_name", "vae": "ss_vae_name",
    "train_batch_size": "ss_batch_size_per_device",
}  # fmt: skip
"""The keys of metadata that are called otherwise than the option."""


def _by_group(number: Callable[[str], float]) -> Callable[[str], object]:
    """What parses numbers for groups, `down=4,up=16`."""
    return lambda text: {group: number(value) for group, _, value in (own.partition("=") for own in text.split(","))}


_OWN_ARGUMENTS: Mapping[str, Callable[[str], object]] = {
    "layers": lambda text: text.split(","),
    "group_ranks": _by_group(int),
    "group_lr_weights": _by_group(float),
}
"""What parses those arguments in the metadata of lorakit's files that are not written as in Python."""
_ARGUMENT_KEYS: Mapping[str, str] = {**NETWORK_ARG_KEYS, "rs_lora": "rank_stabilized"}
_NOT_COPIED = ("output_name", "resolution", "network_args", "max_token_length", "optimizer_type", "optimizer_args")
_OPTIMIZER = re.compile(r"(?:[\w.]*\.)?(\w+)(?:\((.*)\))?", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:e[+-]?\d+)?")
_OUTER_COMMA = re.compile(r",\s*(?=[A-Za-z_]\w*=)")


def script_of(file: LoRAFile) -> Script:
    """The script of sd-scripts that trains a file's model; without one, a script with the options that all have.

    Raises AdapterError for a file of a model that cannot be trained.
    """
    family = family_of(file.family)
    if family is None and file.family:
        raise AdapterError(f"{file.path} is for {file.family}, which lorakit does not train.")
    script = next((own for own in SCRIPTS if family and family.name in own.families), None)
    if family is None or (script and not script.is_flow):
        return script or TRAIN_NETWORK
    module = file.summary.metadata.get("ss_network_module")
    if script and module in (script.network_module, LYCORIS_MODULE) and not is_by_lorakit(file):
        return script
    return Script("lorakit" if is_by_lorakit(file) else "its metadata", (str(family.name),))


def training_options(file: LoRAFile, script: Script) -> list[str]:
    """The words of a script's command line; what metadata do not tell has a placeholder or is left out."""
    metadata = file.summary.metadata
    given = {
        "pretrained_model_name_or_path": "MODEL.safetensors",
        "network_module": script.network_module,
        "output_dir": "output",
        "train_data_dir": "train",
        "output_name": metadata.get("ss_output_name") or file.path.stem,
        **_shown_by_tensors(file),
        **dict(_copied(metadata, script)),
    }
    family = family_of(file.family)
    if script.is_flow and family and family.name != script.families[0]:
        given["model_type"] = str(family.name)
    has_own_keys = is_by_lorakit(file) or script not in SCRIPTS
    if has_own_keys:
        given.pop("text_encoder_lr", None)
        if given["network_module"] == LYCORIS_MODULE or not is_by_lorakit(file):
            given["network_module"] = LORA_MODULE
            given.pop("network_dropout", None)
    words = []
    for name, value in given.items():
        several = name in OPTIONS and OPTIONS[name].kind == "floats"
        words += [f"--{name}", *value.split()] if several or not value else [f"--{name}={value}"]
    if metadata.get("ss_v2") == "True" and script is TRAIN_NETWORK:
        words.append("--v2")
    if size := re.findall(r"\d+", metadata.get("ss_resolution", "")):
        words.append(f"--resolution={','.join(size[:2])}")
    if metadata.get("ss_max_token_length") in ("150", "225"):
        words.append(f"--max_token_length={metadata['ss_max_token_length']}")
    words += _optimizer(metadata.get("ss_optimizer", ""))
    if (arguments := json_object(metadata, "ss_network_args")) and not has_own_keys:
        words += ["--network_args", *(f"{name}={value}" for name, value in arguments.items())]
    return [*words, *_parts(file)]


def _parts(file: LoRAFile) -> Iterator[str]:
    """The flag for a file of the denoiser or of text encoders alone."""
    if not any(key.startswith("lora_te") for key in file.keys):
        yield "--network_train_unet_only"
    elif not any(key.startswith("lora_unet_") for key in file.keys):
        yield "--network_train_text_encoder_only"


def own_keys(file: LoRAFile, script: Script) -> dict[str, dict[str, object]]:
    """The keys of the config, by section, that sd-scripts has no options for: what lorakit's own files tell."""
    metadata, family = file.summary.metadata, family_of(file.family)
    network: dict[str, object] = {}
    found = {"network": network}
    trained = [part for part in family.parts if _has(file, part.lora_prefix)] if family else []
    if script not in SCRIPTS:
        network["parts"] = [part.name for part in trained]
    if not is_by_lorakit(file):
        return found
    arguments = {name: str(text) for name, text in json_object(metadata, "ss_network_args").items()}
    module = metadata.get("ss_network_module", LORA_MODULE)
    if module in (LORA_MODULE, LYCORIS_MODULE):
        network["name"] = arguments.pop("algo", "c3lier" if "conv_dim" in arguments else "lierla")
        network |= dict(_own_arguments(arguments))
    rates = _plain(metadata.get("ss_text_encoder_lr", "None"))
    if any(part.encoders for part in trained) and isinstance(rates, int | float | list):
        found["optimizer"] = {"text_encoder_lr": rates}
    timesteps = json_object(metadata, "ss_timesteps").items()
    found["timesteps"] = {key: value for key, value in timesteps if isinstance(value, str | int | float)}
    return found


def _has(file: LoRAFile, prefix: str) -> bool:
    return bool(prefix) and any(key.startswith(prefix) for key in file.keys)


def _own_arguments(arguments: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    for name, text in arguments.items():
        try:
            yield _ARGUMENT_KEYS.get(name, name), _OWN_ARGUMENTS.get(name, _plain)(text)
        except ValueError:  # someone has changed it
            continue


def _plain(text: str) -> object:
    """A number, a truth value or a list of numbers, as Python prints them or without brackets; else the text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    if isinstance(value, tuple | list):
        return [*value] if all(isinstance(own, int | float) for own in value) else text
    return value if isinstance(value, int | float) else text


def _shown_by_tensors(file: LoRAFile) -> dict[str, str]:
    """Rank and alpha that most layers have, without 3×3 convolutions, which have their own."""
    downs = {key: file.names.shapes.get(f"{key}.{DOWN}", ()) for key in file.keys}
    ranks = {key: shape[0] for key, shape in downs.items() if shape and max(shape[2:], default=1) == 1}
    if not ranks:
        return {}
    (rank, alpha), _ = Counter((rank, file.alpha(key, rank)) for key, rank in ranks.items()).most_common(1)[0]
    return {"network_dim": str(rank), "network_alpha": f"{alpha:g}"}


def _copied(metadata: Mapping[str, str], script: Script) -> Iterator[tuple[str, str]]:
    for option in (option for option in OPTIONS.values() if option.is_of(script)):
        text = metadata.get(_KEYS.get(option.name, f"ss_{option.name}"), "None")
        if text not in ("None", "", "Dynamic") and option.name not in _NOT_COPIED and not option.unneeded:
            if option.kind == "flag":
                if text == "True":
                    yield option.name, ""
            elif (value := _value(option, text)) is not None:
                yield option.name, value


def _value(option: Option, text: str) -> str | None:
    """The value as it is typed; None where it is no number that should be one, or none of the choices."""
    text = text.strip()
    if option.kind in ("int", "float", "int or share"):
        try:
            number = float(text)
            text = str(int(number)) if option.kind == "int" else text
        except (ValueError, OverflowError):
            return None
    if option.kind == "floats":
        return " ".join(_NUMBER.findall(text)) or None
    return None if option.choices and text not in map(str, (*option.choices, *option.in_files)) else text


def _optimizer(text: str) -> list[str]:
    """`torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.999))` in options."""
    found = _OPTIMIZER.fullmatch(text)
    if found is None:
        return []
    arguments = [part.strip() for part in _OUTER_COMMA.split(found[2])] if found[2] else []
    return [f"--optimizer_type={found[1]}", *(["--optimizer_args", *arguments] if arguments else [])]


def is_by_lorakit(file: LoRAFile) -> bool:
    """Whether lorakit has trained it."""
    return file.summary.metadata.get("modelspec.implementation_version", "").startswith("lorakit/")


def cleans_captions(file: LoRAFile) -> bool:
    """Whether its captions were cleaned with ftfy: by sd-scripts always, by lorakit where the file says so."""
    return not is_by_lorakit(file) or file.summary.metadata.get("ss_fix_text") == "True"


def folders(file: LoRAFile) -> list[str]:
    """The folders that it was trained on, in words."""
    found = json_object(file.summary.metadata, "ss_dataset_dirs")
    return [
        f"Images: {name}, {own.get('img_count', '?')} images, repeated {own.get('n_repeats', '?')} times"
        for name, own in found.items()
        if isinstance(own, dict)
    ]
