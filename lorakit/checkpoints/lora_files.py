"""LoRA files of all tools: what their tensors are called here, and the alphas that are no tensors.

PEFT and diffusers write alphas into a config, as text: `adapter_config.json` beside the file, or in its header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from attrs import frozen

from lorakit.checkpoints.lora_names import ALPHA, DOWN, UP, denoiser_key, own_name, plain_path, split_name
from lorakit.checkpoints.summary import CheckpointSummary, Shapes, read_json
from lorakit.errors import AdapterError, ModelError
from lorakit.utils.wording import counted

PEFT_MAGNITUDE = "lora_magnitude_vector"
"""Part of the names that PEFT has for magnitudes, which are [out], or [1, out, 1, 1] for convolutions."""

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_PAIRS = ((DOWN, UP), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))
_TOGETHER: Mapping[str, tuple[str, ...]] = {suffix: group for group in (*_PAIRS, _LOHA) for suffix in group}
"""Names of tensors behind that of the layer, and all those that are there where one of them is."""
_PEFT_PREFIX = "base_model.model."
_PARTS = {
    "lora_unet_": "unet.", "lora_te_": "text_encoder.", "lora_te1_": "text_encoder.", "lora_te2_": "text_encoder_2.",
}  # fmt: skip


@frozen
class LoRANames:
    """How the tensors of a LoRA file are called here."""

    in_file: Mapping[str, str]
    """The name in the file of each tensor, by its name here: `lora_unet_….lora_down.weight`."""
    alphas: Mapping[str, float]
    """Alphas that are no tensors of the file, by the key of the layer."""


def lora_names(
    summary: CheckpointSummary,
    keys: Mapping[str, str] = MappingProxyType({}),
    rename: Callable[[str], str] = own_name,
) -> LoRANames:
    """How the tensors of a file are called here; `keys` has the keys of layers by all names that files have for them.

    Tensors of layers that are not in `keys` are renamed by `rename`, and if that leaves them as they are, by their path
    in a denoiser. Raises `AdapterError` where the file has a tensor twice, or invalid alphas.
    """
    in_file: dict[str, str] = {}
    for name in summary.tensors:
        path, suffix = split_name(name)
        known = (keys[own] for own in (path, plain_path(path), denoiser_key(path)) if own in keys)
        key = next(known, "") if suffix else ""
        own = f"{key}.{suffix}" if key else rename(name)
        if own == name and suffix and (key := denoiser_key(path)):
            own = f"{key}.{suffix}"
        if own in in_file:
            raise AdapterError(f"{summary.path} holds two adapters for one layer: {in_file[own]} and {name}.")
        in_file[own] = name
    return LoRANames(in_file, dict(_alphas(summary, in_file)))


def own_shapes(summary: CheckpointSummary, names: LoRANames) -> Shapes:
    """The shape of each tensor by its name here; one side for PEFT's magnitudes, which have ones around it."""
    shapes = {own: summary.tensors[name] for own, name in names.in_file.items()}
    peft = [own for own, name in names.in_file.items() if PEFT_MAGNITUDE in name]
    return shapes | {own: (math.prod(shapes[own]),) for own in peft}


def bare_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the ones at its end: the same for factors of a 1×1 convolution and of a linear layer."""
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return tuple(sides)


def missing_factors(shapes: Shapes) -> str:
    """What a file lacks of adapters of which it has a part: `lora_unet_….lora_up.weight and 8 more tensors`."""
    split = [name.partition(".") for name in shapes]
    needed = (f"{key}.{other}" for key, _, suffix in split for other in _TOGETHER.get(suffix, ()))
    lacking = [name for name in dict.fromkeys(needed) if name not in shapes]
    # Each half of LoKr is one matrix or two factors.
    halves = {(key, suffix[:7]) for key, _, suffix in split if suffix.startswith("lokr_w")}
    wanted = ((key, half) for key, _ in halves for half in ("lokr_w1", "lokr_w2"))
    lacking += sorted(f"{key}.{half}" for key, half in set(wanted) - halves)
    more = f" and {counted(len(lacking) - 1, 'more tensor', 'more tensors')}" if len(lacking) > 1 else ""
    return f"{lacking[0]}{more}" if lacking else ""


def _alphas(summary: CheckpointSummary, in_file: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    lacking = {
        own: name
        for own, name in in_file.items()
        if own.endswith(f".{DOWN}") and f"{own.removesuffix(DOWN)}{ALPHA}" not in in_file and summary.tensors[name]
    }
    try:
        config = _peft_config(summary, lacking.values())
        for own, name in lacking.items() if config else ():
            prefix = next((prefix for start, prefix in _PARTS.items() if own.startswith(start)), "")
            # The settings of one part of a pipeline, where they have prefixes.
            part = {
                key.removeprefix(prefix): value for key, value in config.items() if prefix and key.startswith(prefix)
            }
            has_prefixes = any(key.startswith(tuple(_PARTS.values())) for key in config)
            alpha = _alpha(part if has_prefixes else config, split_name(name)[0], summary.tensors[name][0])
            if alpha is not None:
                yield own.removesuffix(f".{DOWN}"), alpha
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{summary.path}: the settings that PEFT wrote for it cannot be used: {error}.") from None
    except ModelError as error:
        raise AdapterError(f"{error}.") from error


def _peft_config(summary: CheckpointSummary, names: Iterable[str]) -> Mapping[str, Any]:
    """The settings that PEFT or diffusers wrote for a file; empty if there are none."""
    written = summary.metadata.get("lora_adapter_metadata")
    if written is not None:
        config = json.loads(written)
        return config if isinstance(config, Mapping) else {}
    beside = summary.path.with_name("adapter_config.json")
    return read_json(beside) if any(name.startswith(_PEFT_PREFIX) for name in names) and beside.is_file() else {}


def _alpha(config: Mapping[str, Any], path: str, rank: int) -> float | None:
    """The alpha of a layer, such that alpha / rank is what its update is multiplied by. Raises ValueError."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise ValueError("alpha_pattern is no table")
    alpha = next((own for pattern, own in patterns.items() if _matches(pattern, path)), config.get("lora_alpha"))
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise ValueError(f"an alpha is {str(alpha)[:50]}")
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern of PEFT is for a layer: the end of its path, from the start of one of its steps.

    Raises ValueError for patterns that are regular expressions, as those of strangers can take forever.
    """
    plain = pattern.removeprefix("^").removeprefix(".*").removesuffix("$").replace("\\.", ".").removeprefix(".")
    if not plain.replace(".", "").replace("_", "").isalnum():
        raise ValueError(f"alpha_pattern has a regular expression, {pattern[:50]}, which lorakit does not read")
    return path == plain or path.endswith(f".{plain}")
