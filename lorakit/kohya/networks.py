"""The network from sd-scripts' options and the arguments of its `networks.lora`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping

from lorakit.api.block_layout import curve
from lorakit.api.components import NetworkConfig
from lorakit.api.network_metadata import LORA_MODULE, LYCORIS_MODULE
from lorakit.config.sd_scripts import NETWORK_ARG_KEYS
from lorakit.config.table_reader import field_names
from lorakit.config.training_scripts import MODELS, SCRIPTS
from lorakit.errors import ConfigError, PluginError, Problem
from lorakit.kohya.command_line import OTHER_MODELS
from lorakit.kohya.draft import Command, Draft, Setting
from lorakit.kohya.flow_networks import write_flow_network
from lorakit.kohya.lycoris import BUILT_IN, write_lycoris
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.import_path import check_import_path
from lorakit.plugins.other_names import meaning_of

Value = int | float | str | list[int] | list[float]


def _whole_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _numbers_or_zero(text: str) -> list[float]:
    return [float(number) if number.strip() else 0.0 for number in text.split(",")]


def _numbers_or_curve(text: str) -> str | list[float]:
    if "," in text:
        return _numbers_or_zero(text)
    curve(text, 2)
    return text


_WHOLE = "comma-separated integers"
_LIST = "comma-separated numbers"
_WEIGHTS = "comma-separated numbers, or the name of a preset such as sine+0.25"

_NUMBER: tuple[Callable[[str], Value], str] = (float, "a number")

NETWORK_ARGS: Mapping[str, tuple[Callable[[str], Value], str]] = {
    "conv_dim": (int, "a whole number"),
    "conv_alpha": _NUMBER,
    "rank_dropout": _NUMBER,
    "module_dropout": _NUMBER,
    "block_dims": (_whole_numbers, _WHOLE),
    "block_alphas": (_numbers, _LIST),
    "conv_block_dims": (_whole_numbers, _WHOLE),
    "conv_block_alphas": (_numbers, _LIST),
    "down_lr_weight": (_numbers_or_curve, _WEIGHTS),
    "mid_lr_weight": (_numbers_or_zero, _LIST),
    "up_lr_weight": (_numbers_or_curve, _WEIGHTS),
    "block_lr_zero_threshold": _NUMBER,
    "loraplus_lr_ratio": _NUMBER,
    "loraplus_unet_lr_ratio": _NUMBER,
    "loraplus_text_encoder_lr_ratio": _NUMBER,
}
"""What networks.lora takes in --network_args: what parses its text, or raises ValueError, and what it must be."""

_SIDES: Mapping[str, str] = {"down_lr_weight": "down", "mid_lr_weight": "mid", "up_lr_weight": "up"}
_BY_BLOCK = ("block_alphas", "conv_block_dims", "conv_block_alphas")
_NOT_FROM_WEIGHTS = ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "block_dims", *_BY_BLOCK)
_OF_LORA_ALONE = {"scale_weight_norms": "scale_weight_norms", "dim_from_weights": "rank_from_weights"}
_OPTIONS_NOT_FROM_WEIGHTS = {"network_dim": "rank", "network_alpha": "alpha", "network_dropout": "dropout"}


def write_network(command: Command, draft: Draft, catalog: Catalog) -> None:
    """[network]: LoRA-C3Lier where 3×3 convolutions get a rank, else LoRA-LierLa or what another module is."""
    module = command.get("network_module")
    if not module:
        raise ConfigError([Problem("--network_module", "is missing", "networks.lora is the usual one")])
    _refuse_module(module, command)
    if command.get("network_train_unet_only") and command.get("network_train_text_encoder_only"):
        message = "cannot be combined with --network_train_text_encoder_only, as nothing would be trained"
        raise ConfigError([Problem("--network_train_unet_only", message)])
    args = command.pairs("network_args")
    if not command.get("network_alpha"):  # which means the rank in sd-scripts
        draft.set("network", "alpha", command.setting("network_alpha", float(command.get("network_dim"))))
    if command.script.is_flow and module == command.script.network_module:
        write_flow_network(args, command, draft)
        return
    if module == LYCORIS_MODULE and not command.script.is_flow and write_lycoris(args, command, draft):
        return
    if module != LORA_MODULE:
        _write_other(module, args, command, draft, catalog)
        return
    values = {key: _value(key, text) for key, text in args.items()}
    for key, reason in _without_effect(values, command.get("dim_from_weights")):
        del values[key]
        draft.note("network_args", f"{key}={args[key]} has no effect {reason}")
    for name, key in _OPTIONS_NOT_FROM_WEIGHTS.items() if command.get("dim_from_weights") else ():
        if draft.sections.get("network", {}).pop(key, None) is not None and name in command.given:
            draft.note(name, "has no effect with --dim_from_weights")
    source = next((f"--network_args {key}" for key in ("conv_dim", "conv_block_dims") if key in values), "")
    draft.set("network", "name", Setting("c3lier" if source else "lierla", source or "--network_module"))
    _write_values(values, command, draft, catalog)


def _refuse_module(module: str, command: Command) -> None:
    """Raise ConfigError for a module of sd-scripts that is for another script than the command's."""
    usual = command.script.network_module
    model = next((model for part, model in OTHER_MODELS.items() if part in re.split(r"[._]", module)), "")
    if not module.startswith("networks.") or module == usual or not (model or command.script.is_flow):
        return
    if not model:
        message = f"{module} is not for {command.script.name}"
        if module == LORA_MODULE:
            raise ConfigError([Problem("--network_module", message, f"{usual} is")])
        return
    script = next((script for script in SCRIPTS if script.network_module == module), None)
    if OTHER_MODELS.keys() & {*re.split(r"[._]", usual)} & {*re.split(r"[._]", module)}:
        raise ConfigError([Problem("--network_module", f"{module} has no counterpart", f"{usual} is the usual one")])
    hint = f"its script is {script.name}" if script else MODELS
    raise ConfigError([Problem("--network_module", f"{module} is for {model}", hint)])


def _write_other(module: str, args: Mapping[str, str], command: Command, draft: Draft, catalog: Catalog) -> None:
    """A module of another package, which the plugin `lorakit-network-modules` takes by its path."""
    draft.set("network", "name", command.setting("network_module"))
    for option, key in _OF_LORA_ALONE.items():
        if draft.sections["network"].pop(key, None) is not None:
            draft.mark_unsupported(option, command.get(option), f"the adapters of {module} do not support it")
    if args:
        draft.set("network", "args", Setting(dict(args), "--network_args"))
    hint = meaning_of("network", module, ()) if module.startswith("networks.") else ""
    try:
        catalog.find(NetworkConfig, module)
        is_there = not hint or not any(check_import_path(module))
    except PluginError:
        is_there = False
    if not is_there:
        cure = hint or "install the plugin lorakit-network-modules"
        cure += _built_in(args, command) if module == LYCORIS_MODULE else ""
        draft.mark_unsupported("network_module", module, f"`lorakit check` rejects the config; {cure}")


def _built_in(args: Mapping[str, str], command: Command) -> str:
    """The network of lorakit that comes nearest to one of LyCORIS, as the end of a sentence; empty where none does."""
    algorithm = args.get("algo", "lora")
    if algorithm in BUILT_IN:
        layers = "" if command.script.is_flow else ", whose layers are those of preset=attn-mlp"
        return f", or take network.name = {algorithm!r}{layers}"
    if algorithm not in ("lora", "locon"):
        return ""
    if command.script.is_flow:
        return ', or take network.name = "lierla"'
    return ', or take network.name = "c3lier" with conv_rank and conv_alpha, which is LoCon'


def _value(key: str, text: str) -> Value:
    if key not in NETWORK_ARGS:
        near = difflib.get_close_matches(key, NETWORK_ARGS, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise ConfigError([Problem(f"--network_args {key}", "is not an argument of networks.lora", hint)])
    convert, expected = NETWORK_ARGS[key]
    try:
        return convert(text)
    except ValueError as error:
        message = f"must be {expected}, not {text!r}"
        raise ConfigError([Problem(f"--network_args {key}", message)]) from error


def _without_effect(values: Mapping[str, Value], from_weights: bool) -> Iterator[tuple[str, str]]:
    """The arguments that networks.lora passes over, each with the reason."""
    is_blockwise = "block_dims" in values or any(key in values for key in _SIDES)
    has_convolutions = bool(values.get("conv_dim")) or (is_blockwise and "conv_block_dims" in values)
    for key in tuple(values):
        if from_weights and key in _NOT_FROM_WEIGHTS:
            yield key, "with --dim_from_weights"
        elif key in _BY_BLOCK and not is_blockwise:
            yield key, "without block_dims, down_lr_weight, mid_lr_weight or up_lr_weight"
        elif key == "conv_block_alphas" and "conv_block_dims" not in values:
            yield key, "without conv_block_dims"
        elif (key == "conv_alpha" and not has_convolutions) or (key == "conv_dim" and not values[key]):
            yield key, "without a conv_dim above 0"


def _write_values(values: Mapping[str, Value], command: Command, draft: Draft, catalog: Catalog) -> None:
    """Write the arguments, lists as long as the U-Net has blocks."""
    try:
        known = field_names(catalog.find(NetworkConfig, str(draft.sections["network"]["name"].value)))
    except PluginError:
        known = [NETWORK_ARG_KEYS.get(name, name) for name in NETWORK_ARGS]
    ranks = {"block_alphas": values.get("block_dims", command.get("network_dim"))}
    ranks["conv_block_alphas"] = values.get("conv_block_dims", 0)
    for key, given in values.items():
        value = given
        if key in _SIDES and isinstance(value, list):
            value = _as_long_as_side(key, value, command, draft)
        elif key == "conv_alpha":
            value = value or values.get("conv_dim", 1)
        elif key in ranks and isinstance(value, list):
            value = _alphas(value, ranks[key])
        name = NETWORK_ARG_KEYS.get(key, key)
        if name in known:
            draft.set("network", name, Setting(value, f"--network_args {key}"))
        else:
            draft.mark_unsupported("network_args", f"{key}={given}")


def _as_long_as_side(key: str, numbers: list[int] | list[float], command: Command, draft: Draft) -> list[float]:
    """As sd-scripts does it: 1 for blocks that have no number, and numbers for blocks that there are not left out."""
    layout = command.family.layout
    length = len(layout.groups[_SIDES[key]]) if layout else len(numbers)
    if len(numbers) != length:
        done = "padded with 1" if len(numbers) < length else "cut off"
        draft.note("network_args", f"{key} has {len(numbers)} numbers, {done} to get {length}")
    return [float(number) for number in numbers[:length]] + [1.0] * (length - len(numbers))


def _alphas(alphas: list[int] | list[float], ranks: object) -> list[float]:
    """Alphas of blocks; for 0 the rank, as sd-scripts has it, and 1 where that is 0 too and nothing depends on it."""
    of_blocks = ranks if isinstance(ranks, list) else [ranks] * len(alphas)
    of_blocks += [1] * (len(alphas) - len(of_blocks))
    return [float(alpha or rank or 1) for alpha, rank in zip(alphas, of_blocks, strict=False)]
