"""The table of sd-scripts' options is whole, and says of each what is really so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.config.sd_scripts import GROUPS, OPTIONS, OTHER_KEYS
from lorakit.config.sd_scripts_option import Option
from lorakit.config.training_scripts import SDXL_TRAIN_NETWORK
from lorakit.kohya.draft import OptionStatus, keys_and_choices, option_status
from lorakit.plugins.catalog import Catalog
from tests.docs.pages import ROOT
from tests.docs.test_pages import known_keys as keys_of_the_reference
from tests.kohya.conftest import Convert

TYPES: dict[str, Any] = {
    "flag": bool, "int": int, "float": float, "text": str, "path": str, "texts": tuple, "floats": tuple,
    "int or share": int | float,
}  # fmt: skip
VALUES: dict[str, Any] = {
    "flag": [], "int": ["3"], "float": ["0.5"], "text": ["word"], "path": ["a/path"], "texts": ["a=1"],
    "floats": ["0.5"], "int or share": ["7"],
}  # fmt: skip
OWN_VALUES: dict[str, list[str]] = {
    "log_with": ["wandb"],
    "network_args": ["conv_dim=2"],
    "optimizer_args": ["eps=1e-3"],
    "lr_scheduler_args": ["lr_end=0.5"],
    "face_crop_aug_range": ["2.0,4.0"],
    "resolution": ["128,64"],
    "train_data_dir": ["train"],
    "save_last_n_steps": ["7"],
    "save_last_n_steps_state": ["7"],
    "log_tracker_config": ["tracker.toml"],
    "huggingface_repo_visibility": ["public"],
    "weighting_scheme": ["logit_normal"],
}
"""Values for options that do not take any text or number."""

CONTEXT: dict[str, list[str]] = {
    "base_weights_multiplier": ["--base_weights=a.safetensors"],
    "lr_warmup_steps": ["--lr_scheduler=linear"],
    "lr_scheduler_num_cycles": ["--lr_scheduler=cosine_with_restarts"],
    "lr_scheduler_power": ["--lr_scheduler=polynomial"],
    "lr_scheduler_args": ["--lr_scheduler=polynomial"],
    "lr_decay_steps": ["--lr_scheduler=warmup_stable_decay"],
    "lr_scheduler_timescale": ["--lr_scheduler=inverse_sqrt"],
    "lr_scheduler_min_lr_ratio": ["--lr_scheduler=warmup_stable_decay"],
    "dynamo_backend": ["--torch_compile"],
    "log_with": ["--logging_dir=logs"],
    "log_prefix": ["--logging_dir=logs"],
    "log_tracker_name": ["--log_with=wandb"],
    "log_tracker_config": ["--log_with=wandb"],
    "wandb_run_name": ["--log_with=wandb"],
    "save_last_n_epochs": ["--save_every_n_epochs=1"],
    "save_last_n_steps": ["--save_every_n_steps=2"],
    "save_last_n_epochs_state": ["--save_every_n_epochs=1"],
    "save_last_n_steps_state": ["--save_every_n_steps=2"],
    "huggingface_repo_type": ["--huggingface_repo_id=me/x"],
    "huggingface_path_in_repo": ["--huggingface_repo_id=me/x"],
    "huggingface_repo_visibility": ["--huggingface_repo_id=me/x"],
    "save_state_to_huggingface": ["--huggingface_repo_id=me/x"],
    "sample_prompts": ["--sample_prompts=others.txt", "--sample_at_first"],
    "sample_every_n_steps": ["--sample_prompts=prompts.txt"],
    "sample_every_n_epochs": ["--sample_prompts=prompts.txt"],
    "sample_at_first": ["--sample_prompts=prompts.txt"],
    "sample_sampler": ["--sample_prompts=prompts.txt", "--sample_at_first"],
    "xformers": ["--seed=1"],
    "model_type": ["--pretrained_model_name_or_path=gone.safetensors"],
    "discrete_flow_shift": ["--timestep_sampling=shift"],
    "sigmoid_scale": ["--timestep_sampling=sigmoid"],
    "logit_mean": ["--weighting_scheme=logit_normal"],
    "mode_scale": ["--weighting_scheme=mode"],
    "logit_std": ["--weighting_scheme=logit_normal"],
    "weighting_scheme": ["--discrete_flow_shift=1"],
    "compile_backend": ["--compile"],
    "guidance_scale": ["--pretrained_model_name_or_path=gone.safetensors"],
}
"""Options that others need beside them to mean anything."""

SAME_AS_DEFAULT = {"sdpa", "xformers", "mem_eff_attn", "attn_mode"}
"""Options whose only effect is what lorakit does anyway; the config still says so."""

TOLD_OTHERWISE = {"apply_t5_attn_mask", "guidance_scale", "model_prediction_type"}
"""Options without a key that are told where they mean something, with tests of their own."""

Leasts = Callable[[str], tuple[str, ...]]


def words(option: Option) -> list[str]:
    """An option with a value that is not its default."""
    choices = [str(choice) for choice in option.choices if choice not in (option.default, 0)]
    return [f"--{option.name}", *(OWN_VALUES.get(option.name) or choices[:1] or VALUES[option.kind])]


def by_state(state: OptionStatus) -> list[str]:
    """The names of all options in a state."""
    keys = keys_and_choices(Catalog.discover())
    return [name for name, option in OPTIONS.items() if option_status(option, keys) is state]


def test_there_are_239_options() -> None:
    """All options are there, some of them of newer scripts alone, each once, with a default of its own kind."""
    assert len(OPTIONS) == sum(map(len, GROUPS.values())) == 239
    assert len([option for option in OPTIONS.values() if SDXL_TRAIN_NETWORK in option.scripts]) == 3
    for option in OPTIONS.values():
        assert option.default is None or isinstance(option.default, TYPES[option.kind]), option
        assert option.default in (None, "", *option.choices) or not option.choices, option
        assert option.kind != "flag" or option.default is False, option
        assert option.key or option.unneeded or option.later, option


def test_keys_exist() -> None:
    """No option that works names a key that the reference of the config file does not have."""
    keys = keys_of_the_reference() | {"observers.name", "data.config"}
    working = [name for name in by_state(OptionStatus.WORKS) if not OPTIONS[name].plugin]
    assert len(working) > 50
    assert not [name for name in working if OPTIONS[name].key.partition(" = ")[0] not in keys]


def test_a_new_key_makes_options_work() -> None:
    """An option works from the moment when its key, or the component that the key names, is there."""
    flag, number = Option("v2", "flag", False, key='model.family = "sd9"'), Option("x", "float", key="loss.x")
    keys = keys_and_choices(Catalog.discover())
    assert [option_status(option, keys) for option in (flag, number)] == [OptionStatus.UNSUPPORTED] * 2
    keys |= {'model.family = "sd9"': None, "loss.x": None}
    assert [option_status(option, keys) for option in (flag, number)] == [OptionStatus.WORKS] * 2


def test_plugins_have_the_keys_of_their_options() -> None:
    """A key that a plugin brings is a field of a component in it."""
    options = [option for option in OPTIONS.values() if option.plugin]
    assert options
    for option in options:
        sources = (ROOT / "plugins" / option.plugin).glob("lorakit_*/*.py")
        field = option.key.partition(".")[2]
        assert any(re.search(rf"^    {field}: ", source.read_text(), re.M) for source in sources), option


def test_agrees_with_suggestions() -> None:
    """What `lorakit check` suggests for an option's name is the key that the table names."""
    common = [name for name in OTHER_KEYS if name in OPTIONS and OPTIONS[name].key]
    assert len(common) > 20
    for name in common:
        suggested = re.match(r"[a-z_]+\.[a-z_]+\b", OTHER_KEYS[name])
        assert not suggested or suggested[0] == OPTIONS[name].key.partition(" = ")[0], name


def test_page_lists_every_option() -> None:
    """The page for users of sd-scripts has one row for each option, with its state."""
    text = Path(ROOT / "docs/how-to/coming-from-sd-scripts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--(\w+)` \| ([a-z ]+) \| .+ \|$", text, re.M)
    assert sorted(name for name, _ in rows) == sorted(OPTIONS)
    expected = {name: state.value for state in OptionStatus for name in by_state(state)}
    assert dict(rows) == expected


@pytest.mark.parametrize("name", by_state(OptionStatus.WORKS))
def test_options_that_work_change_the_config(name: str, converted: Convert, leasts: Leasts) -> None:
    """An option that works changes the key that the table names, and is named there as its source."""
    data = [] if name in ("dataset_config", "train_data_dir") else ["--train_data_dir=train"]
    context = [*data, *CONTEXT.get(name, [])]
    without_data = tuple(word for word in leasts(name) if "dataset_config" not in word)
    given = tuple(word for word in without_data if not word.startswith(f"--{name}="))
    draft = converted(*context, *words(OPTIONS[name]), least=given)
    if name == "dataset_repeats":  # the names of the folders win
        draft = converted(*words(OPTIONS[name]))
    assert any(f"--{name}" == source.split()[0] for source in sources(draft)), draft
    if name not in SAME_AS_DEFAULT and given == without_data and data:
        assert draft.tables() != converted(*context, least=without_data).tables()


def sources(draft: Any) -> list[str]:
    """What stands behind the keys of a draft."""
    tables = [*draft.sections.values(), draft.general, *draft.observers]
    for own, subsets in draft.datasets:
        tables += [own, *subsets]
    return [setting.source for table in tables for setting in table.values()]


@pytest.mark.parametrize("name", sorted({*by_state(OptionStatus.UNSUPPORTED)} - TOLD_OTHERWISE))
def test_options_without_a_counterpart_are_told(name: str, converted: Convert, leasts: Leasts) -> None:
    """An option that nothing does the same as is noted, with its value, and changes nothing else."""
    draft = converted(*words(OPTIONS[name]), least=leasts(name))
    (told,) = [remark for remark in draft.remarks if remark.key.startswith(f"--{name}")]
    assert told.message == "has no counterpart" or "with --dataset_config" in told.message
    assert draft.tables() == converted(least=leasts(name)).tables()


DEFAULTS = [
    name
    for name in by_state(OptionStatus.UNSUPPORTED)
    if OPTIONS[name].default not in (None, (), False) and name not in TOLD_OTHERWISE
]


@pytest.mark.parametrize("name", DEFAULTS)
def test_options_at_their_default_are_not_told(name: str, converted: Convert, leasts: Leasts) -> None:
    """An option without a counterpart is nothing to speak of when it is given its default."""
    option = OPTIONS[name]
    least = leasts(name)
    assert converted(f"--{name}={option.default}", least=least).remarks == converted(least=least).remarks


@pytest.mark.parametrize("name", sorted(set(by_state(OptionStatus.NOT_NEEDED)) - {"config_file"}))
def test_options_that_are_not_needed_change_nothing(name: str, converted: Convert, leasts: Leasts) -> None:
    """An option that is not needed changes nothing and is not told."""
    least = (*leasts(name), "--network_train_unet_only")
    draft, without = converted(*words(OPTIONS[name]), least=least), converted(least=least)
    assert draft.tables() == without.tables()
    assert draft.remarks == without.remarks
