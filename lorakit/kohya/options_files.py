"""Files that hold options of sd-scripts: those for --config_file, written by hand or by another program.

sd-scripts passes over a key that it does not know, and takes 1 for true. Programs write what is not set as an empty
text, an empty list or zero.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import Factory, frozen

from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.sd_scripts_option import Option
from lorakit.config.toml_files import read_toml
from lorakit.config.training_scripts import TRAIN_NETWORK, Script
from lorakit.config.values import toml_repr
from lorakit.errors import ConfigError, Problem
from lorakit.utils.wording import listed


@frozen
class Given:
    """The options of one call, and what is to be said of where they come from."""

    options: Mapping[str, Any]
    """By name."""
    sources: Mapping[str, str] = Factory(dict)
    """For those of a file what they are called there: `--network_dim`, or the name of another program's key."""
    remarks: tuple[Problem, ...] = ()
    script: Script | None = None
    """The script that they are for, if it is known."""


UNSAID = "not in the file: set it"
"""The source of a value that is only in the place of another."""

_OTHERS = frozenset({
    "clip_g_dropout_rate", "clip_l_dropout_rate", "epoch", "gemma2_max_token_length", "learning_rate_te",
    "learning_rate_te1", "learning_rate_te2", "learning_rate_te3", "lowvram", "lr_restart_cycles", "mem_eff_save",
    "model_train_type", "noise_offset_type", "sample_batch_size", "stop_text_encoder_training", "t5_dropout_rate",
    "text_encoder", "text_encoder_cpu",
})  # fmt: skip
"""Keys that programs write and sd-scripts does not have, and that are no misspelt options."""

_UNFINISHED = frozenset({
    "conv_alpha", "conv_dim", "down_lr_weight", "dylora_unit", "lokr_factor", "lycoris_algo", "mid_lr_weight",
    "negative_prompts", "network_args_custom", "optimizer_args_custom", "positive_prompts", "prodigy_d0",
    "prodigy_d_coef", "prompt_file", "sample_cfg", "sample_height", "sample_seed", "sample_steps", "sample_width",
    "train_norm", "up_lr_weight",
})  # fmt: skip
"""Keys that the page of lora-scripts makes options of when a run starts."""

_ZERO_COUNTS = frozenset({"seed", "validation_seed", "unet_lr", "lr_scheduler_min_lr_ratio"})
"""Numbers without a default for which 0 is something else than nothing."""


def read_options_file(path: Path) -> Given:
    """The options in a file for `--config_file`; its tables have no meaning, as with sd-scripts.

    Raises ConfigError, which names all misspelt keys and all wrong values.
    """
    try:
        tables = read_toml(path)
    except ValueError as error:
        raise ConfigError([Problem("--config_file", f"{path} {error}")]) from error
    values: dict[str, Any] = {}
    for key, value in tables.items():
        values |= value if isinstance(value, Mapping) else {key: value}
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    unknown = []
    for key, value in values.items():
        if key in OPTIONS:
            take(key, value, f"{path.name}: {key}", found, problems)
        elif isinstance(value, Mapping):
            hint = "programs with their own formats write a file of sd-scripts options when a run starts: use that"
            problems.append(Problem(f"{path.name}: {key}", "is a nested table, which sd-scripts ignores", hint))
        elif key in _OTHERS | _UNFINISHED or not nearest(key, cutoff=0.75):
            unknown.append(key)
        else:
            problems.append(unknown_option(key, f"{path.name}: "))
    if problems:
        raise ConfigError(problems)
    return Given(found, {name: f"--{name}" for name in found}, tuple(_remarks(path.name, unknown)))


def take(name: str, value: Any, place: str, found: dict[str, Any], problems: list[Problem]) -> None:
    """Put the value of an option from a file into `found` where it says anything, or what is wrong into `problems`."""
    option = OPTIONS[name]
    if value is None or value in ("", []) or (option.default is None and _is_zero(value) and name not in _ZERO_COUNTS):
        return
    try:
        found[name] = _value(option, value)
    except ValueError as error:
        problems.append(Problem(place, str(error)))


def _is_zero(value: Any) -> bool:
    return not isinstance(value, bool) and value in (0, "0")


def _remarks(file: str, unknown: list[str]) -> list[Problem]:
    """Remarks on the keys that sd-scripts ignores, too."""
    unfinished = [key for key in unknown if key in _UNFINISHED]
    others = [key for key in unknown if key not in _UNFINISHED]
    found = []
    if others:
        found.append(Problem(file, f"{', '.join(others)}: ignored, as in sd-scripts"))
    if unfinished:
        message = f"{', '.join(unfinished)}: ignored, as in sd-scripts"
        hint = "lora-scripts converts them when a run starts: use the file in its config/autosave"
        found.append(Problem(file, message, hint))
    return found


def _value(option: Option, value: Any) -> Any:
    """The value as one of the option's type; raises ValueError with the end of a sentence that starts with it."""
    kind = option.kind
    if kind in ("texts", "floats"):
        return _list(kind, value)
    wrong = f"must be {WORDS[kind]}, not {toml_repr(value)}"
    if kind == "flag":
        found: Any = _FLAGS.get(str(value).lower())
    elif kind in ("text", "path"):
        found = value if isinstance(value, str) else None
        if kind == "text" and isinstance(value, int | float):
            found = str(value).lower() if isinstance(value, bool) else f"{value}"
    else:
        found = _number(kind, value)
    if found is None:
        raise ValueError(wrong)
    if option.name == "max_token_length" and 75 < found < 300:
        found = 75 * len(range(75, found + 1, 75))  # the whole chunks of 75 tokens that sd-scripts makes: 255 is 225
    if option.choices and found not in (*option.choices, *option.in_files):
        raise ValueError(not_a_choice(option, found))
    return found


_FLAGS: Mapping[str, bool] = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _number(kind: str, value: Any) -> int | float | None:
    """A number as it is meant; programs write `64.0` and `"64"` for 64. None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        if kind == "int or share":
            return whole_or_share(str(value))
        number = float(value)
        if kind == "float":
            return value if isinstance(value, int) else number
        return int(number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return None


def _list(kind: str, value: Any) -> list[Any]:
    """A list of texts or numbers; a single one stands for itself."""
    items = value if isinstance(value, list) else [value]
    if kind == "texts":
        if isinstance(value, str) and value.count("=") > 1:
            items = shlex.split(value)
        found: list[Any] = [item for item in items if isinstance(item, str)]
    else:
        found = [number for number in (_number("float", item) for item in items) if number is not None]
    if len(found) != len(items):
        raise ValueError(f"must be {WORDS[kind]}, not {toml_repr(value)}")
    return found


def whole_or_share(text: str) -> int | float:
    """A number of steps, or a share of the run below 1, which may be given in per cent: `500`, `0.1`, `10%`."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    value = float(text)
    return int(text.removesuffix(".0")) if value >= 1 or value == 0 else value


WORDS: Mapping[str, str] = {
    "flag": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "a text",
    "path": "a path",
    "texts": "texts",
    "floats": "numbers",
    "int or share": "a number of steps, or a fraction below 1",
}
"""What an option of each kind takes."""


def not_a_choice(option: Option, value: object) -> str:
    """The error for a value that is not among the option's choices."""
    return f"must be one of {', '.join(map(str, option.choices))}, not {value!r}"


def options_of(script: Script | None) -> list[str]:
    """The names of the options that a script has; all of them where it is not known."""
    return [name for name, option in OPTIONS.items() if option.is_of(script)]


def nearest(name: str, script: Script | None = None, *, cutoff: float = 0.6) -> str:
    """The option of a script with the nearest name; empty where none is near."""
    near = difflib.get_close_matches(name, options_of(script), n=1, cutoff=cutoff)
    return near[0] if near else ""


def unknown_option(word: str, place: str = "", script: Script | None = None) -> Problem:
    """The error for an option that a script does not have; `place` is the file that contains it."""
    name = word.lstrip("-").partition("=")[0]
    near, dashes = nearest(name, script), "" if place else "--"
    others = listed([other.name for other in OPTIONS[name].scripts]) if name in OPTIONS else ""
    hint = f"it is one of {others}" if others else f"did you mean {dashes}{near}?" if near else ""
    return Problem(f"{place}{dashes}{name}", f"is not an option of {(script or TRAIN_NETWORK).name}", hint)
