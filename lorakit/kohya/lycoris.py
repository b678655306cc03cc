"""LoHa and LoKr from the arguments of `lycoris.kohya`, where all of these have a counterpart."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorakit.kohya.draft import Command, Draft, Setting

BUILT_IN = ("loha", "lokr")
"""What the argument `algo` is for networks that come with lorakit, which have the same name."""

_OFF = ("", "0", "0.0", "false", "none", "no", "off")


def _is_on(text: str) -> bool:
    return text.lower() not in _OFF


_PRESETS: Mapping[str, tuple[str, ...]] = {
    "attn-mlp": ("unet", "text_encoder"),
    "unet-transformer-only": ("unet",),
}
"""Presets without the layers outside of blocks, for which lorakit has no adapters; and the parts that they train."""
_KEYS: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "module_dropout": ("module_dropout", float),
    "rs_lora": ("rank_stabilized", _is_on),
}
_KEYS_OF_LOKR: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "factor": ("factor", int),
    "decompose_both": ("decompose_both", _is_on),
    "full_matrix": ("full_matrix", _is_on),
}
"""Arguments of LyCORIS with a key of [network], and what parses their text."""
_UNUSED = ("no_dim_warn", "block_size", "conv_dim", "conv_alpha", "dropout")
"""Arguments that change nothing with these algorithms and presets."""
_OFF_ONLY = (
    "rank_dropout", "use_tucker", "use_cp", "use_conv_cp", "use_scalar", "bypass_mode", "dora_wd", "train_norm",
    "rescaled", "constraint", "unbalanced_factorization", "rank_dropout_scale",
)  # fmt: skip
"""Arguments without a counterpart, which may be there as long as they switch nothing on."""


def _values(algorithm: str, args: Mapping[str, str]) -> dict[str, object] | None:
    """The keys of [network] that arguments give; None where some have no counterpart or cannot be read."""
    known = {**_KEYS, **(_KEYS_OF_LOKR if algorithm == "lokr" else {})}
    rest = {name: text for name, text in args.items() if name not in ("algo", "preset", *known, *_UNUSED)}
    if any(_is_on(text) or name not in _OFF_ONLY for name, text in rest.items()):
        return None
    try:
        return {key: parse(args[name]) for name, (key, parse) in known.items() if name in args}
    except ValueError:
        return None


def write_lycoris(args: Mapping[str, str], command: Command, draft: Draft) -> bool:
    """Write [network] for LoHa or LoKr; false, with nothing written, where the arguments ask for more."""
    algorithm, preset = args.get("algo", ""), args.get("preset", "")
    parts, values = _PRESETS.get(preset, ()), _values(algorithm, args)
    nothing = len(parts) == 1 and command.get("network_train_text_encoder_only")
    if algorithm not in BUILT_IN or not parts or values is None or nothing:
        return False
    draft.set("network", "name", Setting(algorithm, f"--network_args algo={algorithm}"))
    if len(parts) == 1:
        draft.set("network", "parts", Setting(command.parts(parts), f"--network_args preset={preset}"))
    for key, value in values.items():
        if value:
            draft.set("network", key, Setting(value, "--network_args"))
    _tell_unused(algorithm, args, command, draft)
    return True


def _tell_unused(algorithm: str, args: Mapping[str, str], command: Command, draft: Draft) -> None:
    """Leave out options that these networks do not have, and say so."""
    own = draft.sections["network"]
    if own.pop("dropout", None) is not None and command.is_typed("network_dropout"):
        draft.note("network_dropout", f"has no effect with algo={algorithm}, in LyCORIS either")
    if own.pop("scale_weight_norms", None) is not None:
        reason = f"network.name = {algorithm!r} does not support it"
        draft.mark_unsupported("scale_weight_norms", command.get("scale_weight_norms"), reason)
    for name in _UNUSED:
        if name in args:
            draft.note("network_args", f"{name}={args[name]} has no effect with algo={algorithm} and this preset")
