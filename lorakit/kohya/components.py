"""The optimizer and the learning-rate schedule from sd-scripts' names and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lorakit.components import Component, LRSchedulerConfig, OptimizerConfig
from lorakit.config.tables import field_names
from lorakit.errors import ConfigError, PluginError, Problem
from lorakit.kohya.drafts import Command, Draft, Setting
from lorakit.kohya.options import OPTIONS
from lorakit.kohya.states import State
from lorakit.plugins import Catalog

ComponentT = TypeVar("ComponentT", bound=Component)

OPTIMIZER_NAMES: Mapping[str, str] = {"": "adamw", "dadaptadampreprint": "dadaptation"}
"""lorakit's names of sd-scripts' optimizers, where they are not the same in lower case."""

ADAFACTOR_DEFAULTS: Mapping[str, object] = {"relative_step": True, "scale_parameter": True}
"""What holds with sd-scripts' Adafactor and not with lorakit's, when nothing is said."""


def write_optimizer(command: Command, draft: Draft, catalog: Catalog) -> None:
    """[optimizer]: name, learning rates, and the arguments that lorakit's optimizer takes too."""
    option, name = _optimizer_name(command)
    draft.set("optimizer", "name", command.setting(option, name))
    component = _component(catalog, OptimizerConfig, name)
    if component is None:
        reason = "`lorakit check` refuses the config until optimizer.name names another"
        draft.leave_out(option, command.get(option), reason)
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
        if rate in command.given:
            draft.remark(rate, "has no effect, as Adafactor with relative_step=True finds the learning rate itself")


def finds_its_lr(draft: Draft) -> bool:
    """Whether the optimizer takes no learning rate."""
    optimizer = draft.sections["optimizer"]
    return optimizer["name"].value == "adafactor" and bool(optimizer["relative_step"].value)


def _optimizer_name(command: Command) -> tuple[str, str]:
    """The option that names the optimizer, and lorakit's name of it."""
    named = [name for name in ("optimizer_type", "use_8bit_adam", "use_lion_optimizer") if command.get(name)]
    if len(named) > 1:
        raise ConfigError([Problem(f"--{named[0]}", f"cannot stand beside --{named[1]}", "leave one of them out")])
    option = named[0] if named else "optimizer_type"
    if option != "optimizer_type":
        return option, OPTIONS[option].key.partition('"')[2].rstrip('"')
    name = str(command.get(option))
    return option, OPTIMIZER_NAMES.get(name.lower(), name.lower())


def _learning_rates(command: Command, draft: Draft) -> None:
    draft.set("optimizer", "lr", command.setting("learning_rate"))
    if command.get("unet_lr") is not None:
        draft.set("optimizer", "unet_lr", command.setting("unet_lr"))
    rates = command.get("text_encoder_lr")
    if rates:
        draft.set("optimizer", "text_encoder_lr", command.setting("text_encoder_lr", rates[0]))
        if len(rates) > 1:
            draft.remark("text_encoder_lr", f"{rates[1]:g} has no effect, as networks.lora takes only the first")


def write_lr_scheduler(command: Command, draft: Draft, catalog: Catalog) -> None:
    """[lr_scheduler]: name, and those of the options that lorakit's schedule takes too."""
    if finds_its_lr(draft):
        source = "sd-scripts has no other schedule with Adafactor's relative_step"
        draft.set("lr_scheduler", "name", Setting("constant", source))
        for other in ("lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps", *_SCHEDULE_OPTIONS):
            if other in command.given:
                draft.remark(other, f"has no effect: {source}")
        return
    option = "lr_scheduler_type" if command.get("lr_scheduler_type") else "lr_scheduler"
    name = command.get(option)
    draft.set("lr_scheduler", "name", command.setting(option))
    component = _component(catalog, LRSchedulerConfig, name)
    if component is None:
        reason = "`lorakit check` refuses the config until lr_scheduler.name names another"
        draft.leave_out(option, name, reason)
    _warmup(command, draft, name)
    for other, key in _SCHEDULE_OPTIONS.items():
        if other not in command.given or not command.get(other):
            continue
        if component is None or key in field_names(component):
            draft.set("lr_scheduler", key, command.setting(other))
        elif command.state(other) is State.WORKS:
            draft.remark(other, f"has no effect with --lr_scheduler={name}")
    _write_arguments("lr_scheduler", component, command, draft)


def _write_arguments(section: str, component: type[Component] | None, command: Command, draft: Draft) -> None:
    """Write those of a component's `key=value` arguments that it takes; all of them where there is none to ask."""
    option = f"{section}_args"
    for key, value in command.literals(option).items():
        if (component is None or key in field_names(component)) and _fits_toml(value):
            draft.set(section, key, Setting(_as_list(value), f"--{option} {key}"))
        else:
            draft.leave_out(option, f"{key}={value}")


_SCHEDULE_OPTIONS: Mapping[str, str] = {
    name: OPTIONS[name].key.partition(".")[2]
    for name in (
        "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale",
        "lr_scheduler_min_lr_ratio",
    )
}  # fmt: skip


def _warmup(command: Command, draft: Draft, name: str) -> None:
    steps = command.get("lr_warmup_steps")
    if steps and name == "constant":
        hint = "give --lr_scheduler=constant_with_warmup, or leave the warm-up out"
        raise ConfigError([Problem("--lr_warmup_steps", "cannot be used with --lr_scheduler=constant", hint)])
    if steps:
        draft.set("lr_scheduler", "warmup_steps", command.setting("lr_warmup_steps"))


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
