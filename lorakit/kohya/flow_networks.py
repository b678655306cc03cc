"""The network from the arguments of sd-scripts' `networks.lora_flux` and `networks.lora_anima`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lorakit.api.components import ModelPart
from lorakit.config.training_scripts import FLUX_TRAIN_NETWORK
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.draft import Command, Draft, Setting
from lorakit.kohya.flow_layers import Layer, choice_of, layers_of

Patterns = list[tuple[str, float]]
"""Regular expressions for names of layers, each with a number."""


def _is_true(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _patterns(text: str) -> Patterns:
    """`.*mlp.*=8,.*attn.*=4`; what is no pair is passed over, as sd-scripts does it."""
    pairs = (pair.rpartition("=") for pair in text.split(",") if "=" in pair)
    found = [(key.strip(), float(value)) for key, _, value in pairs]
    for pattern, _ in found:
        _compiled(pattern)
    return found


def _expressions(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError from error
    found = value if isinstance(value, list) else [value]
    return [_compiled(pattern).pattern for pattern in found]


def _compiled(pattern: object) -> re.Pattern[str]:
    try:
        return re.compile(str(pattern))
    except re.error as error:
        raise ValueError from error


def _blocks(text: str, count: int) -> tuple[bool, ...]:
    """Which blocks are trained: `all`, `none`, or numbers and ranges, `0-3,8`."""
    if text in ("all", "none", ""):
        return (text == "all",) * count
    chosen: set[int] = set()
    for part in text.split(","):
        start, dash, end = part.partition("-")
        first, last = int(start), int(end if dash else start)
        if not 0 <= first <= last < count:
            raise ValueError
        chosen |= {*range(first, last + 1)}
    return tuple(number in chosen for number in range(count))


def _one_of(text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise ValueError
    return text


def _five(text: str) -> list[int]:
    numbers = [int(number) for number in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if len(numbers) != 5:
        raise ValueError
    return numbers


Reader = tuple[Callable[[str], object], str]
_NUMBER: Reader = (float, "a number")
_WHOLE: Reader = (int, "a whole number")
_FLAG: Reader = (_is_true, "True or False")
_PAIRS: Reader = (_patterns, "regular expressions with numbers, such as .*mlp.*=8")
_EXPRESSIONS: Reader = (_expressions, "a quoted regular expression, or a Python list of them")
_BLOCKS = "all, none, or numbers of blocks such as 0-3,8"

_COPIED = (
    "rank_dropout", "module_dropout", "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio",
)  # fmt: skip
"""Arguments with a key of their own name in `[network]`."""
_BOTH: Mapping[str, Reader] = {
    **dict.fromkeys(_COPIED, _NUMBER),
    "network_reg_dims": _PAIRS,
    "network_reg_lrs": _PAIRS,
    "verbose": _FLAG,
}
_DIMS: Mapping[str, tuple[str, ...]] = {
    "img_attn_dim": ("img_attn",),
    "txt_attn_dim": ("txt_attn",),
    "img_mlp_dim": ("img_mlp",),
    "txt_mlp_dim": ("txt_mlp",),
    "img_mod_dim": ("img_mod",),
    "txt_mod_dim": ("txt_mod",),
    "single_dim": ("single_blocks", "linear"),
    "single_mod_dim": ("modulation",),
}
"""Arguments with the rank of layers whose names contain these words; the first that fits counts."""

ARGUMENTS: Mapping[str, Mapping[str, Reader]] = {
    "networks.lora_flux": {
        **_BOTH,
        **dict.fromkeys(("conv_dim", *_DIMS), _WHOLE),
        **dict.fromkeys(("conv_alpha", "ggpo_beta", "ggpo_sigma"), _NUMBER),
        "in_dims": (_five, "five whole numbers, for img, time, vector, guidance and txt"),
        "train_blocks": (partial(_one_of, choices=("all", "single", "double")), "all, single or double"),
        "train_double_block_indices": (partial(_blocks, count=19), f"{_BLOCKS}, below 19"),
        "train_single_block_indices": (partial(_blocks, count=38), f"{_BLOCKS}, below 38"),
        "split_qkv": _FLAG,
        "train_t5xxl": _FLAG,
    },
    "networks.lora_anima": {
        **_BOTH,
        "train_llm_adapter": _FLAG,
        "include_patterns": _EXPRESSIONS,
        "exclude_patterns": _EXPRESSIONS,
    },
}
"""What each module takes in --network_args: what parses its text, or raises ValueError, and what it must be."""

_CHOOSING = (
    *_DIMS, "train_blocks", "train_double_block_indices", "train_single_block_indices", "network_reg_dims",
    "include_patterns", "exclude_patterns",
)  # fmt: skip
"""Arguments that say which layers get adapters, and of which rank."""
_FROM_FILE = (*_CHOOSING, "conv_dim", "conv_alpha", "in_dims", "split_qkv", "ggpo_beta", "ggpo_sigma", *_COPIED[:2])
"""Arguments that do nothing where the file says which layers there are."""
_ANIMA_EXCLUDED = r".*(_modulation|_norm|_embedder|final_layer).*"
_ANIMA_OUTSIDE = (
    "x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2", "final_layer.linear",
    "final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2",
)  # fmt: skip
"""Layers of Anima outside of blocks, which `include_patterns` can choose."""
_ELSEWHERE = (
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo",
    "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "llm_adapter.blocks.0.self_attn.q_proj",
    "llm_adapter.blocks.0.mlp.0",
)  # fmt: skip
"""Layers of text encoders, one of each kind, as sd-scripts names them for regular expressions."""

Values = dict[str, Any]
"""The arguments, parsed."""


def write_flow_network(args: Mapping[str, str], command: Command, draft: Draft) -> None:
    """[network] from the arguments of the script's own module. Raises ConfigError for what it would not take."""
    module = command.script.network_module
    values = {key: _value(key, text, module) for key, text in args.items()}
    if command.get("dim_from_weights"):
        for key in [key for key in values if key in _FROM_FILE]:
            del values[key]
            draft.note("network_args", f"{key}={args[key]} has no effect with --dim_from_weights")
    draft.set("network", "name", Setting("lierla", "--network_module"))
    parts = _parts(values, command)
    names = [part.name for part in parts]
    source = "--network_args train_t5xxl" if values.get("train_t5xxl") else "what sd-scripts trains"
    only = ("network_train_unet_only", "network_train_text_encoder_only")
    source = next((f"--{name}" for name in only if command.get(name)), source)
    source = "--network_args train_llm_adapter" if values.get("train_llm_adapter") else source
    draft.set("network", "parts", Setting(names, source))
    for key in _COPIED:
        if values.get(key):
            draft.set("network", key, Setting(values[key], f"--network_args {key}"))
    _tell(values, args, command, draft)
    if any(not part.encoders for part in parts) and not command.get("dim_from_weights"):
        _write_choice(values, args, command, draft, parts)
    _write_rates(values, parts, command, draft)


def _value(key: str, text: str, module: str) -> object:
    known = ARGUMENTS[module]
    if key not in known:
        other = next((name for name, own in ARGUMENTS.items() if key in own), "")
        hint = f"it is one of {other}" if other else f"it takes {', '.join(known)}"
        raise ConfigError([Problem(f"--network_args {key}", f"is not an argument of {module}", hint)])
    convert, expected = known[key]
    try:
        return convert(text)
    except ValueError as error:
        raise ConfigError([Problem(f"--network_args {key}", f"must be {expected}, not {text!r}")]) from error


def _parts(values: Values, command: Command) -> list[ModelPart]:
    """The parts that get adapters: with both scripts also the first text encoder, unless an option leaves it out."""
    parts = command.family.parts
    encoders = [part for part in parts if part.encoders]
    chosen = set()
    if not command.get("network_train_text_encoder_only"):
        chosen |= {part.name for part in parts if not part.encoders}
        chosen |= {encoders[-1].name} if values.get("train_llm_adapter") else set()
    if not command.get("network_train_unet_only"):
        chosen |= {encoders[0].name} if len(encoders) > 1 else set()
        chosen |= {encoders[-1].name} if values.get("train_t5xxl") else set()
    if not chosen:
        message = "trains nothing with --model_type=chroma, which has no CLIP"
        hint = "add --network_args train_t5xxl=True"
        raise ConfigError([Problem("--network_train_text_encoder_only", message, hint)])
    return [part for part in parts if part.name in chosen]


def _tell(values: Values, args: Mapping[str, str], command: Command, draft: Draft) -> None:
    """Remarks on arguments without a counterpart."""
    for key in ("conv_dim", "conv_alpha"):
        if key in values:
            draft.note("network_args", f"{key}={args[key]} has no effect, as there are no convolutions")
    if values.get("split_qkv"):
        reason = "one adapter is trained for queries, keys and values; split ones act at a part of their strength"
        draft.mark_unsupported("network_args", f"split_qkv={args['split_qkv']}", reason)
    if any(values.get("in_dims", ())):
        reason = "layers outside of blocks get no adapters"
        draft.mark_unsupported("network_args", f"in_dims={args['in_dims']}", reason)
    if "ggpo_beta" in values and "ggpo_sigma" in values:
        text = f"ggpo_beta={args['ggpo_beta']} ggpo_sigma={args['ggpo_sigma']}"
        draft.mark_unsupported("network_args", text, "noise is not added to weights")
    elif one := next((key for key in ("ggpo_beta", "ggpo_sigma") if key in values), ""):
        draft.note("network_args", f"{one}={args[one]} has no effect alone")
    if values.get("train_t5xxl") and command.get("network_train_unet_only"):
        draft.note("network_args", f"train_t5xxl={args['train_t5xxl']} has no effect with --network_train_unet_only")
    unet = values.get("loraplus_unet_lr_ratio", values.get("loraplus_lr_ratio"))
    if values.get("train_llm_adapter") and unet != values.get(
        "loraplus_text_encoder_lr_ratio", values.get("loraplus_lr_ratio")
    ):
        message = "counts for the LLM adapter, too, in sd-scripts; in lorakit that is a text encoder"
        draft.note("network_args", f"loraplus_unet_lr_ratio {message}")


def _layers(command: Command) -> list[Layer]:
    layout = command.family.layout
    return layers_of(command.family.name, layout) if layout else []


def _matching(patterns: Patterns, layer: Layer, command: Command) -> float | None:
    """The number behind the first expression that a layer's name fits."""
    is_flux = command.script is FLUX_TRAIN_NETWORK
    name = f"lora_unet_{layer.path.replace('.', '_')}" if is_flux else layer.path
    match = re.search if is_flux else re.fullmatch
    return next((number for pattern, number in patterns if match(pattern, name)), None)


def _rank(values: Values, layer: Layer, command: Command) -> int:
    """The rank that sd-scripts gives a layer, 0 for none."""
    excluded = [*values.get("exclude_patterns", ()), _ANIMA_EXCLUDED]
    if command.script is not FLUX_TRAIN_NETWORK and any(re.fullmatch(own, layer.path) for own in excluded):
        included: list[str] = values.get("include_patterns", [])
        if not any(re.fullmatch(own, layer.path) for own in included):
            return 0
    if values.get("train_blocks", "all") not in ("all", layer.group):
        return 0
    patterns: Patterns = values.get("network_reg_dims", [])
    matched = _matching(patterns, layer, command)
    if matched is not None:
        return int(matched)
    number = int(layer.path.split(".")[1])
    trained: tuple[bool, ...] | None = values.get(f"train_{layer.group}_block_indices")
    if trained is not None and not trained[number]:
        return 0
    fitting = (key for key, words in _DIMS.items() if key in values and all(word in layer.path for word in words))
    rank = values.get(next(fitting, ""), command.get("network_dim"))
    return int(rank)


def _write_choice(
    values: Values, args: Mapping[str, str], command: Command, draft: Draft, parts: Sequence[ModelPart]
) -> None:
    """Which layers get adapters, and of which rank: kinds of layers, and ranks of groups or of single blocks."""
    asked = {key: args[key] for key in _CHOOSING if key in values}
    if not asked:
        return
    ranks = {layer: _rank(values, layer, command) for layer in _layers(command)}
    choice = choice_of(ranks)
    includes: list[str] = values.get("include_patterns", [])
    outside = [name for name in _ANIMA_OUTSIDE if any(re.fullmatch(own, name) for own in includes)]
    if outside:
        text, reason = f"include_patterns={args['include_patterns']}", "is outside of blocks and gets no adapter"
        draft.mark_unsupported("network_args", text, f"for {outside[0]}, which {reason}")
    if choice is None:
        text = " ".join(f"{key}={value}" for key, value in asked.items())
        reason = "layers are chosen by their kind, network.layers, and ranks by block, network.block_ranks"
        draft.mark_unsupported("network_args", text, reason)
        return
    source = f"--network_args {', '.join(asked)}"
    if choice.tags:
        others = ["text_encoder"] if any(part.encoders for part in parts) else []
        draft.set("network", "layers", Setting([*choice.tags, *others], source))
    _write_ranks(choice.ranks, source, command, draft)
    _tell_text_encoders(asked, values, parts, draft)


def _write_ranks(ranks: Sequence[int], source: str, command: Command, draft: Draft) -> None:
    layout, usual = command.family.layout, command.get("network_dim")
    if layout is None or set(ranks) == {usual}:
        return
    of_groups = {group: {ranks[number] for number in numbers} for group, numbers in layout.groups.items()}
    if all(len(own) == 1 for own in of_groups.values()):
        different = {group: own.pop() for group, own in of_groups.items()}
        changed = {group: rank for group, rank in different.items() if rank != usual}
        draft.set("network", "group_ranks", Setting(changed, source))
    else:
        draft.set("network", "block_ranks", Setting([*ranks], source))


def _tell_text_encoders(asked: Mapping[str, str], values: Values, parts: Sequence[ModelPart], draft: Draft) -> None:
    """Say so where an expression would count for layers of text encoders, too."""
    if not any(part.encoders for part in parts):
        return
    for key in ("network_reg_dims", "network_reg_lrs", "exclude_patterns"):
        found: Sequence[object] = values.get(key, ())
        patterns = [own[0] if isinstance(own, tuple) else own for own in found]
        if key in asked and any(re.search(str(own), name) for own in patterns for name in _ELSEWHERE):
            draft.note("network_args", f"{key}={asked[key]} counts for the transformer alone in lorakit")


def _write_rates(values: Values, parts: Sequence[ModelPart], command: Command, draft: Draft) -> None:
    """Factors of learning rates of groups of blocks, where regular expressions say no more than that."""
    patterns: Patterns = values.get("network_reg_lrs", [])
    if not patterns:
        return
    text = ",".join(f"{pattern}={rate:g}" for pattern, rate in patterns)
    usual = command.get("unet_lr") if command.get("unet_lr") is not None else command.get("learning_rate")
    by_group: dict[str, set[float]] = {}
    for layer, rate in _rates_of_layers(values, patterns, command):
        by_group.setdefault(layer.group, set()).add(usual if rate is None else rate)
    if not usual or any(len(rates) > 1 for rates in by_group.values()):
        reason = "learning rates differ by group of blocks, network.group_lr_weights"
        draft.mark_unsupported("network_args", f"network_reg_lrs={text}", reason)
        return
    factors = {group: rates.pop() / usual for group, rates in by_group.items()}
    changed = {group: round(factor, 12) for group, factor in factors.items() if factor != 1}
    if changed:
        draft.set("network", "group_lr_weights", Setting(changed, "--network_args network_reg_lrs"))
    else:
        draft.note("network_args", f"network_reg_lrs={text} has no effect, as no layer's learning rate differs")
    _tell_text_encoders({"network_reg_lrs": text}, values, parts, draft)


def _rates_of_layers(values: Values, patterns: Patterns, command: Command) -> Iterator[tuple[Layer, float | None]]:
    for layer in _layers(command):
        if _rank(values, layer, command):
            yield layer, _matching(patterns, layer, command)


def write_text_encoder_lrs(command: Command, draft: Draft) -> None:
    """The learning rates of the text encoders that get adapters; the LLM adapter has the transformer's."""
    encoders = [part for part in command.family.parts if part.encoders]
    trained = draft.sections["network"]["parts"].value
    given: list[float] = command.get("text_encoder_lr") or []
    usual = command.get("learning_rate")
    rates = {encoders[0].name: given[0] if given else usual}
    if command.script is FLUX_TRAIN_NETWORK:
        rates[encoders[-1].name] = given[min(1, len(given) - 1)] if given else usual
        used = given[1:2] if encoders[-1].name in trained else given[:1]
    else:
        rates[encoders[-1].name] = command.get("unet_lr") if command.get("unet_lr") is not None else usual
        used = given[:1]
    own = [rates[part.name] for part in encoders if part.name in trained]
    if given and (not own or {*given[:2]} - {*own, *used}):
        unused = " ".join(f"{rate:g}" for rate in given if rate not in own)
        draft.note("text_encoder_lr", f"{unused} has no effect, as no text encoder that it is for is trained")
    if own and (given or own != [usual] * len(own)):
        numbers = [rates[part.name] if part.name in trained else own[0] for part in encoders]
        value = numbers if len({*numbers}) > 1 else numbers[0]
        setting = command.setting("text_encoder_lr", value)
        is_theirs = not given and "unet_lr" in command.given
        draft.set("optimizer", "text_encoder_lr", command.setting("unet_lr", value) if is_theirs else setting)
