"""From the metadata of a LoRA file to the options of sd-scripts that would repeat its training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from lorakit.api.network_metadata import LORA_MODULE
from lorakit.checkpoints.lora_names import DOWN
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.sd_scripts_option import Option
from lorakit.config.training_scripts import SDXL_TRAIN_NETWORK, TRAIN_NETWORK, Script
from lorakit.lora_tools.adapters import LoRAFile
from lorakit.lora_tools.metadata import json_object

_KEYS = {
    "pretrained_model_name_or_path": "ss_sd_model_name", "vae": "ss_vae_name",
    "train_batch_size": "ss_batch_size_per_device",
}  # fmt: skip
"""The keys of metadata that are called otherwise than the option."""


def _by_group(number: Callable[[str], float]) -> Callable[[str], object]:
    """What parses numbers for groups, `down=4,up=16`."""
    return lambda text: {group: number(value) for group, _, value in (own.partition("=") for own in text.split(","))}


_OWN_ARGUMENTS: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "dora_wd": ("dora", "True".__eq__),
    "rank_stabilized": ("rank_stabilized", "True".__eq__),
    "layers": ("layers", lambda text: text.split(",")),
    "group_ranks": ("group_ranks", _by_group(int)),
    "group_lr_weights": ("group_lr_weights", _by_group(float)),
}
"""Arguments in the metadata of lorakit's own files, the key of [network] of each, and what parses its text."""
_NOT_COPIED = ("output_name", "resolution", "network_args", "max_token_length", "optimizer_type", "optimizer_args")
_OPTIMIZER = re.compile(r"(?:[\w.]*\.)?(\w+)(?:\((.*)\))?", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:e[+-]?\d+)?")
_OUTER_COMMA = re.compile(r",\s*(?=[A-Za-z_]\w*=)")


def training_options(file: LoRAFile) -> list[str]:
    """The words of a command line, the script first; what metadata do not tell has a placeholder or is left out."""
    metadata = file.summary.metadata
    is_xl = file.family == "Stable Diffusion XL"
    script = SDXL_TRAIN_NETWORK if is_xl else TRAIN_NETWORK
    words = [script.name]
    given = {
        "pretrained_model_name_or_path": "MODEL.safetensors",
        "network_module": "networks.lora",
        "output_dir": "output",
        "train_data_dir": "train",
        "output_name": metadata.get("ss_output_name") or file.path.stem,
        **_shown_by_tensors(file),
        **dict(_copied(metadata, script)),
    }
    for name, value in given.items():
        several = name in OPTIONS and OPTIONS[name].kind == "floats"
        words += [f"--{name}", *value.split()] if several or not value else [f"--{name}={value}"]
    if metadata.get("ss_v2") == "True" and not is_xl:
        words.append("--v2")
    if size := re.findall(r"\d+", metadata.get("ss_resolution", "")):
        words.append(f"--resolution={','.join(size[:2])}")
    if metadata.get("ss_max_token_length") in ("150", "225"):
        words.append(f"--max_token_length={metadata['ss_max_token_length']}")
    words += _optimizer(metadata.get("ss_optimizer", ""))
    own = _OWN_ARGUMENTS if _is_of_lora(metadata) else {}
    arguments = {name: value for name, value in json_object(metadata, "ss_network_args").items() if name not in own}
    if arguments:
        words += ["--network_args", *(f"{name}={value}" for name, value in arguments.items())]
    if not any(key.startswith("lora_te") for key in file.keys):
        words.append("--network_train_unet_only")
    elif not any(key.startswith("lora_unet_") for key in file.keys):
        words.append("--network_train_text_encoder_only")
    return words


def network_keys(file: LoRAFile) -> dict[str, object]:
    """The keys of [network] that metadata tell and sd-scripts has no option for."""
    metadata = file.summary.metadata
    arguments = json_object(metadata, "ss_network_args") if _is_of_lora(metadata) else {}
    found: dict[str, object] = {}
    for name, (key, parse) in _OWN_ARGUMENTS.items():
        try:
            found |= {key: parse(str(arguments[name]))} if name in arguments else {}
        except ValueError:  # a stranger's
            continue
    return found


def _is_of_lora(metadata: Mapping[str, str]) -> bool:
    return metadata.get("ss_network_module", LORA_MODULE) == LORA_MODULE


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
        except ValueError:
            return None
        text = str(int(number)) if option.kind == "int" else text
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


def cleans_captions(file: LoRAFile) -> bool:
    """Whether its captions were cleaned with ftfy: by sd-scripts always, by lorakit where the file says so."""
    metadata = file.summary.metadata
    by_lorakit = metadata.get("modelspec.implementation_version", "").startswith("lorakit/")
    return not by_lorakit or metadata.get("ss_fix_text") == "True"


def folders(file: LoRAFile) -> list[str]:
    """The folders that it was trained on, in words."""
    found = json_object(file.summary.metadata, "ss_dataset_dirs")
    return [
        f"Images: {name}, {own.get('img_count', '?')} images, repeated {own.get('n_repeats', '?')} times"
        for name, own in found.items()
        if isinstance(own, dict)
    ]
