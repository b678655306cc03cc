"""The optimizer and the learning-rate schedule from sd-scripts' names and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lorakit.api.components import Component, LRSchedulerConfig, OptimizerConfig
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.table_reader import field_names
from lorakit.errors import ConfigError, PluginError, Problem
from lorakit.kohya.draft import Command, Draft, OptionStatus, Setting
from lorakit.kohya.flow_networks import write_text_encoder_lrs
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.other_names import PLUGINS

ComponentT = TypeVar("ComponentT", bound=Component)

TORCH_OPTIMIZERS = "torch.optim"
"""Where sd-scripts looks for an optimizer that it has no name for; case counts there."""

TORCH_SCHEDULERS = "torch.optim.lr_scheduler"
"""Where it looks for --lr_scheduler_type."""

WRITTEN_DEFAULTS: Mapping[str, tuple[str, ...]] = {"lr_decay_steps": ("warmup_stable_decay",)}
"""Options of schedules with another default than lorakit's, by the schedules that have it."""

IMPLIED_ARGS: Mapping[str, tuple[str, ...]] = {"sgdnesterov": ("nesterov",), "sgdnesterov8bit": ("nesterov",)}
"""Arguments that sd-scripts always sets, as lorakit's optimizer of that name does."""

ADAFACTOR_DEFAULTS: Mapping[str, object] = {"relative_step": True, "scale_parameter": True}
"""Defaults of sd-scripts' Adafactor that differ from lorakit's."""


def write_optimizer(command: Command, draft: Draft, catalog: Catalog) -> None:
    """[optimizer]: name, learning rates, and the arguments that lorakit's optimizer takes too."""
    option, name = _optimizer_name(command, catalog)
    draft.set("optimizer", "name", command.setting(option, name))
    component = _component(catalog, OptimizerConfig, name)
    if component is None:
        plugin = PLUGINS["optimizer"].get(name)
        cure = f"install the plugin {plugin}" if plugin else "choose another"
        draft.mark_unsupported(option, command.get(option), f"`lorakit check` rejects the config; {cure}")
    _write_arguments("optimizer", component, command, draft)
    if name == "adafactor":
        for key, value in ADAFACTOR_DEFAULTS.items():
            draft.sections["optimizer"].setdefault(key, Setting(value, "default of sd-scripts' Adafactor"))
        if draft.sections["optimizer"].get("warmup_init", Setting(False, "")).value:
            draft.set("optimizer", "relative_step", Setting(True, "--optimizer_args warmup_init needs it"))
    if not finds_its_lr(draft):
        _learning_rates(command, draft)
        return
    for rate in ("learning_rate", "unet_lr", "text_encoder_lr"):
        if command.is_typed(rate):
            draft.note(rate, "has no effect, as Adafactor with relative_step=True finds the learning rate itself")


def finds_its_lr(draft: Draft) -> bool:
    """Whether the optimizer takes no learning rate."""
    optimizer = draft.sections["optimizer"]
    return optimizer["name"].value == "adafactor" and bool(optimizer["relative_step"].value)


def _optimizer_name(command: Command, catalog: Catalog) -> tuple[str, str]:
    """The option that names the optimizer, and lorakit's name of it, or the path of its class."""
    named = [name for name in ("optimizer_type", "use_8bit_adam", "use_lion_optimizer") if command.get(name)]
    if len(named) > 1:
        raise ConfigError([Problem(f"--{named[0]}", f"cannot be combined with --{named[1]}", "remove one of them")])
    option = named[0] if named else "optimizer_type"
    if option != "optimizer_type":
        return option, OPTIONS[option].key.partition('"')[2].rstrip('"')
    given = str(command.get(option)) or "AdamW"
    if given.lower() == "dadaptadampreprint":
        return option, "dadaptation"
    # Only lorakit's components and those of its plugins: another plugin may use one of these names for something else.
    registered = catalog.of_kind(OptimizerConfig).items()
    builtin = [name for name, found in registered if any(one.provider.is_of("lorakit") for one in found)]
    for name in (*builtin, *PLUGINS["optimizer"]):
        if name.replace("_", "") == given.lower():
            return option, name
    return option, given if "." in given else f"{TORCH_OPTIMIZERS}.{given}"


def _learning_rates(command: Command, draft: Draft) -> None:
    draft.set("optimizer", "lr", command.setting("learning_rate"))
    if command.get("unet_lr") is not None:
        draft.set("optimizer", "unet_lr", command.setting("unet_lr"))
    rates = command.get("text_encoder_lr")
    if command.script.is_flow and "parts" in draft.sections["network"]:
        write_text_encoder_lrs(command, draft)
    elif rates:
        draft.set("optimizer", "text_encoder_lr", command.setting("text_encoder_lr", rates[0]))
        if len(rates) > 1 and rates[1] != rates[0]:
            message = f"{rates[1]:g} has no effect, as networks.lora takes only the first"
            if len(command.parts(["text_encoder"])) > 1:
                message += f", {rates[0]:g}, for all text encoders; optimizer.text_encoder_lr takes a list"
            draft.note("text_encoder_lr", message)


def write_lr_scheduler(command: Command, draft: Draft, catalog: Catalog) -> None:
    """[lr_scheduler]: name, and those of the options that lorakit's schedule takes too."""
    source = _why_no_schedule(draft)
    if source:
        draft.set("lr_scheduler", "name", Setting("constant", source))
        for other in ("lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", *_SCHEDULE_OPTIONS):
            if command.is_typed(other) and command.get(other) != OPTIONS[other].default:
                draft.note(other, f"has no effect: {source}")
        return
    option, name = "lr_scheduler", command.get("lr_scheduler")
    if path := command.get("lr_scheduler_type"):
        option, name = "lr_scheduler_type", path if "." in path else f"{TORCH_SCHEDULERS}.{path}"
    draft.set("lr_scheduler", "name", command.setting(option, name))
    component = _component(catalog, LRSchedulerConfig, name)
    if component is None:
        reason = "`lorakit check` rejects the config until lr_scheduler.name is changed"
        draft.mark_unsupported(option, name, reason)
    _refuse_schedule(command, option, name)
    for other, key in _SCHEDULE_OPTIONS.items():
        is_default = command.get(other) == OPTIONS[other].default
        if is_default and name not in WRITTEN_DEFAULTS.get(other, ()):
            continue
        if component is None or key in field_names(component):
            draft.set("lr_scheduler", key, command.setting(other))
        elif command.state(other) is OptionStatus.WORKS and command.is_typed(other):
            draft.note(other, f"has no effect with --{option}={command.get(option)}")
    _write_arguments("lr_scheduler", component, command, draft)


def _why_no_schedule(draft: Draft) -> str:
    """Why sd-scripts takes no schedule beside the optimizer; empty where it does."""
    if finds_its_lr(draft):
        return "sd-scripts has no other schedule with Adafactor's relative_step"
    # sd-scripts goes by the name as well.
    if str(draft.sections["optimizer"]["name"].value).lower().endswith("schedulefree"):
        return "sd-scripts has no schedule with a schedule-free optimizer"
    return ""


def _refuse_schedule(command: Command, option: str, name: str) -> None:
    """Raises ConfigError where sd-scripts cannot use its options together."""
    if command.get("lr_warmup_steps") and (name == "constant" or option == "lr_scheduler_type"):
        hint = "give --lr_scheduler=constant_with_warmup, or remove the warm-up"
        message = f"cannot be used with --{option}={command.get(option)}"
        raise ConfigError([Problem("--lr_warmup_steps", message, hint)])
    if name == "cosine_with_min_lr" and command.get("lr_scheduler_min_lr_ratio") is None:
        raise ConfigError([Problem("--lr_scheduler_min_lr_ratio", f"is missing, which --{option}={name} needs")])
    if name == "piecewise_constant" and "step_rules" not in command.pairs("lr_scheduler_args"):
        hint = """--lr_scheduler_args "step_rules='1:100,0.1'\""""
        raise ConfigError([Problem("--lr_scheduler_args", f"must have step_rules with --{option}={name}", hint)])


def _write_arguments(section: str, component: type[Component] | None, command: Command, draft: Draft) -> None:
    """Write those of a component's `key=value` arguments that it takes; all of them if it is not installed."""
    option = f"{section}_args"
    values = command.parse_literals(option)
    known = field_names(component) if component else [*values]
    name = draft.sections[section]["name"].value
    if component and component.takes_import_path:
        given = {key: _as_list(value) for key, value in values.items() if _fits_toml(value)}
        if given:
            draft.set(section, "args", Setting(given, f"--{option}"))
        known = [*given]
    for key, value in values.items():
        if key in IMPLIED_ARGS.get(name, ()) and value is True:
            continue
        if key not in known or not _fits_toml(value):
            draft.mark_unsupported(option, f"{key}={value}")
        elif not (component and component.takes_import_path):
            draft.set(section, key, Setting(_as_list(value), f"--{option} {key}"))


_SCHEDULE_OPTIONS: Mapping[str, str] = {
    name: OPTIONS[name].key.partition(".")[2]
    for name in (
        "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale",
        "lr_scheduler_min_lr_ratio",
    )
}  # fmt: skip


def _component(catalog: Catalog, base: type[ComponentT], name: str) -> type[ComponentT] | None:
    try:
        return catalog.find(base, name)
    except PluginError:
        return None


def _fits_toml(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_fits_toml, value))
    return isinstance(value, bool | int | float | str)


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, list | tuple) else value
