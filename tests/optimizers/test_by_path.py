"""Optimizers and schedules of any package, by the path of their class."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import RAdam
from torch.optim.lr_scheduler import StepLR

from lorakit.api.components import LRSchedulerConfig, OptimizerConfig
from lorakit.config.dump import to_toml
from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError, PluginError
from lorakit.networks.network import ParameterGroup
from lorakit.plugins.catalog import Catalog
from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from lorakit.training.step.metrics import effective_lr

CATALOG = Catalog.discover()


def groups() -> list[ParameterGroup]:
    """Two groups of a parameter each."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    rates = {"text_encoder": 1e-3, "unet": 1e-2}
    return [ParameterGroup(part, part, (own,), rates[part]) for part, own in zip(rates, parameters, strict=True)]


def optimizer(path: str, **args: Any) -> Any:
    """An optimizer by its path."""
    return CATALOG.find(OptimizerConfig, path)(lr=1e-3, args=args)  # type: ignore[call-arg]


def schedule(path: str, **args: Any) -> Any:
    """A schedule by its path."""
    return CATALOG.find(LRSchedulerConfig, path)(args=args)  # type: ignore[call-arg]


def test_class_with_its_arguments() -> None:
    """The class is the one at the path, with its arguments, lists where it has tuples, and each group's own rate."""
    built = optimizer("torch.optim.RAdam", betas=[0.5, 0.6], decoupled_weight_decay=True).build(groups())
    assert type(built) is RAdam
    assert [one["lr"] for one in built.param_groups] == [1e-3, 1e-2]
    assert [one["name"] for one in built.param_groups] == ["text_encoder", "unet"]
    assert built.param_groups[0]["betas"] == (0.5, 0.6)
    assert built.param_groups[0]["decoupled_weight_decay"]
    steps = schedule("torch.optim.lr_scheduler.StepLR", step_size=2, gamma=0.25).build(built, 10)
    assert isinstance(steps, StepLR)
    for _ in range(2):
        built.step()
        steps.step()
    assert [one["lr"] for one in built.param_groups] == pytest.approx([2.5e-4, 2.5e-3])


def test_lists_stay_where_a_list_is_due() -> None:
    """MultiStepLR wants a list, and gets it; a class that wants a learning rate gets one."""
    built = optimizer("bitsandbytes.optim.SGD", momentum=0.9).build(groups())
    milestones = schedule("torch.optim.lr_scheduler.MultiStepLR", milestones=[2, 4]).build(built, 10).milestones
    assert sorted(milestones) == [2, 4]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (optimizer("torch.optim.RAdam", beta=[0.9, 0.99]), "optimizer.args.beta: RAdam has no such argument (it takes"),
        (optimizer("torch.optim.RAdam", betas=[0.9, 9.0]), "optimizer.args: RAdam rejects them: Invalid beta"),
        (optimizer("torch.optim.LBFGS"), "torch.optim.LBFGS needs closure at each step"),
        (optimizer("torch.nn.Linear"), "torch.nn.Linear is not a class derived from torch.optim.optimizer.Optimizer"),
        (optimizer("torch.optim.nothing"), "torch.optim.nothing cannot be imported"),
        (schedule("torch.optim.lr_scheduler.StepLR"), "lr_scheduler.args: StepLR rejects them"),
        (schedule("torch.optim.lr_scheduler.StepLR", size=1), "lr_scheduler.args.size: StepLR has no such argument"),
        (schedule("torch.optim.lr_scheduler.ReduceLROnPlateau"), "needs metrics at each step"),
        (schedule("torch.optim.SGD"), "torch.optim.SGD is not a class derived from"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_the_class_refuses(config: Any, message: str) -> None:
    """What is wrong with a class or its arguments is one problem of the key that it is a problem of."""
    is_optimizer = isinstance(config, OptimizerConfig)
    given = (groups(),) if is_optimizer else (RAdam([nn.Parameter(torch.ones(1))]), 10)
    with pytest.raises(ConfigError) as raised:
        config.build(*given)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.optim.RAdm", "torch.optim has no 'RAdm' (did you mean torch.optim.RAdam?)"),
        ("bitsandbytes.optm.AdamW", "bitsandbytes has no 'optm' (did you mean bitsandbytes.optim?)"),
        ("no_such_package.Thing", "the package 'no_such_package' is not installed"),
        ("torch.optim.", "'torch.optim.' is not the import path of a class"),
        ("torch.opt im.RAdam", "'torch.opt im.RAdam' is not the import path of a class"),
        ("package.Class", "the package 'package' is not installed"),
    ],
)
def test_what_shows_early(path: str, message: str, train_tables: dict[str, Any], tmp_path: Path) -> None:
    """A path that leads nowhere is a problem of `optimizer.name` when the config is read."""
    train_tables["optimizer"] = {"name": path}
    with pytest.raises(ConfigError) as raised:
        config_from_tables(train_tables, tmp_path)
    assert str(raised.value).startswith(f"optimizer.name: {message}")


def test_early_checks_import_nothing() -> None:
    """The package and the class are looked for without importing them."""
    code = (
        "import sys; from lorakit.plugins.import_path import check_import_path;"
        "print(*check_import_path('torch.optim.RAdam'), *check_import_path('bitsandbytes.optim.AdEMAMix8bit'));"
        "print({'torch', 'bitsandbytes'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\nset()\n"


def test_arguments_stand_in_args(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """Arguments beside `args`, and a learning rate in it, are problems that say where they belong."""
    train_tables["optimizer"] = {"name": "torch.optim.RAdam", "foreach": True, "text_encoder_l": 1, "args": {"lr": 1}}
    with pytest.raises(ConfigError) as raised:
        config_from_tables(train_tables, tmp_path)
    assert [str(problem) for problem in raised.value.problems] == [
        "optimizer.foreach: is not a known key (did you mean optimizer.args.foreach?)",
        "optimizer.text_encoder_l: is not a known key (did you mean optimizer.text_encoder_lr?)",
        "optimizer.args.lr: is not an argument here (set optimizer.lr)",
    ]


def test_written_config_has_the_path(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """The config beside the weights names the class; a kind without such components has none by path."""
    train_tables["optimizer"] = {"name": "torch.optim.RAdam", "args": {"betas": [0.5, 0.6]}}
    text = to_toml(config_from_tables(train_tables, tmp_path))
    assert 'name = "torch.optim.RAdam"' in text
    assert "betas = [0.5, 0.6]" in text
    train_tables["saver"] = {"name": "some.Saver"}
    with pytest.raises(ConfigError, match=r"saver\.name: no saver is called 'some\.Saver'"):
        config_from_tables(train_tables, tmp_path)


def test_distributions_can_be_named() -> None:
    """A path with a distribution in front is looked up there only."""
    assert CATALOG.find(OptimizerConfig, "lorakit:torch.optim.RAdam").name == "torch.optim.RAdam"
    with pytest.raises(PluginError, match="no optimizer is called"):
        CATALOG.find(OptimizerConfig, "other-package:torch.optim.RAdam")


def test_refusals_come_before_any_work(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """What an optimizer or a schedule refuses shows before anything is encoded."""
    cache = tmp_path / "cache"
    train_tables["data"]["cache_dir"] = str(cache)
    for changes in (
        {"optimizer": {"name": "torch.optim.RAdam", "args": {"betas": [2, 2]}}},
        {"lr_scheduler": {"name": "torch.optim.lr_scheduler.StepLR"}},
    ):
        config = config_from_tables({**train_tables, **changes}, tmp_path)
        with pytest.raises(ConfigError, match="rejects them"):
            build_run(prepare(config), Distributed(torch.device("cpu")))
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("group", "rate"),
    [
        ({"lr": 0.5}, 0.5),
        ({"lr": 0.5, "d": 0.25}, 0.125),
        ({"lr": 0.5, "d": torch.tensor(0.25)}, 0.5),
        ({"lr": 0.5, "scheduled_lr": 0.1}, 0.1),
    ],
)
def test_effective_rate(group: dict[str, Any], rate: float) -> None:
    """Logs have the rate of the step: times the estimate, where it is a plain number; of a warm-up of its own."""
    assert effective_lr(group) == rate
