"""The network module and its arguments from fields of the kohya_ss GUI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.config.training_scripts import ANIMA_TRAIN_NETWORK, FLUX_TRAIN_NETWORK, Script
from lorakit.errors import ConfigError, Problem

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

_FLOW_TYPES: Mapping[Script, tuple[str, ...]] = {
    FLUX_TRAIN_NETWORK: ("Flux1", "Flux1 OFT"),
    ANIMA_TRAIN_NETWORK: ("Anima", "Kohya LoHa", "Kohya LoKr"),
}
"""What the GUI trains with the scripts for flow matching, the usual type first; FLUX.1 also with LyCORIS."""

_FLUX_FIELDS = (
    "img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim",
    "single_mod_dim", "in_dims", "train_double_block_indices", "train_single_block_indices", "split_qkv",
    "train_t5xxl",
)  # fmt: skip
_DROPOUTS = ("rank_dropout", "module_dropout")


def network_of(fields: Mapping[str, Any], script: Script) -> tuple[str, list[str]]:
    """The module that the GUI trains with a script, and its arguments, `key=value`.

    Raises ConfigError for a type of LoRA that it does not train with it.
    """
    type_ = str(fields.get("LoRA_type", _FLOW_TYPES[script][0] if script.is_flow else "Standard"))
    type_ = "LyCORIS/LoCon" if type_ == "LoCon" else type_
    algorithm = type_.removeprefix("LyCORIS/") if type_.startswith("LyCORIS/") else ""
    if script.is_flow and type_ not in _FLOW_TYPES[script] and not (algorithm and script is FLUX_TRAIN_NETWORK):
        hint = f"choose {_FLOW_TYPES[script][0]}, as the GUI asks for with {script.name}"
        raise ConfigError([Problem("LoRA_type", f"{type_!r} is for another model, or unknown", hint)])
    if type_ in ("Flux1", "Anima") and script.is_flow:
        return script.network_module, [*_flow_arguments(fields, script), *_arguments(fields, (*_DROPOUTS, *_LORA_PLUS))]
    if type_ == "Flux1 OFT" and script.is_flow:
        return "networks.oft_flux", [*_arguments(fields, ("enable_all_linear",))]
    if algorithm in _LYCORIS:
        name, names = _LYCORIS[algorithm]
        args = [f"algo={name}", f"preset={fields.get('LyCORIS_preset') or 'full'}"]
        args += [] if name == "full" else _convolutions(fields)
        return "lycoris.kohya", [*args, *_arguments(fields, (*names, *_LORA_PLUS), _ARGUMENT_NAMES)]
    if type_ not in _OWN_MODULES:
        raise ConfigError([Problem("LoRA_type", f"{type_!r} is for another model, or unknown")])
    names = _LORA_FIELDS
    names += ("unit",) if type_ == "Kohya DyLoRA" else ()
    names += ("factor", "use_tucker") if type_ in ("Kohya LoHa", "Kohya LoKr") else ()
    args = [] if type_ in ("Standard", "LoRA-FA") else _convolutions(fields)
    return _OWN_MODULES[type_], [*args, *_arguments(fields, (*names, *_LORA_PLUS))]


def _convolutions(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name}={short(fields.get(name, 1))}" for name in ("conv_dim", "conv_alpha")]


def _arguments(
    fields: Mapping[str, Any], names: tuple[str, ...], renamed: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The arguments of those fields that switch something on."""
    for name in names:
        value = fields.get(name)
        is_off = value in (None, "", False, 0, "0", "False") or (name == "factor" and value == -1)
        if not is_off:
            yield f"{(renamed or {}).get(name, name)}={short(value)}"


def _flow_arguments(fields: Mapping[str, Any], script: Script) -> Iterator[str]:
    """The arguments of `networks.lora_flux`; in a text field, a 0 is a rank or the number of a block."""
    if script is not FLUX_TRAIN_NETWORK:
        return
    noise = ("ggpo_beta", "ggpo_sigma") if fields.get("train_lora_ggpo") else ()
    for name in (*_FLUX_FIELDS, *noise):
        if value := fields.get(name):
            yield f"{name}={short(value)}"
    if fields.get("split_mode"):
        yield "train_blocks=single"


def short(value: Any) -> Any:
    """A number without the `.0` that a slider leaves."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
