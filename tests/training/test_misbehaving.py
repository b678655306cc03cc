"""Components of guests that raise, or make nonsense: named with their package, and left out where a run can do that."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.api.observer import Observer
from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError, NotSaved, PluginError
from lorakit.plugins.catalog import Catalog
from lorakit.training.loop import train
from lorakit.training.observers import Observers
from lorakit.training.prepare import prepare
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run, run_training
from tests.guests import install
from tests.training.test_runs import same, write_config

_numbers = itertools.count()

GUEST = '''
from attrs import frozen
from lorakit.api import *
from lorakit.networks.adapter_file import SafetensorsSaver
from lorakit.builtin.optimizers.standard import AdamWConfig


class FailingSaver(SafetensorsSaver):
    def save(self, adapter, path):
        {save}


@frozen(kw_only=True)
class GuestConfig({base}):
    """A guest."""

    name = "guest"

    {method}


@hookimpl
def register_{hook}():
    return [GuestConfig]
'''
"""A plugin with one component, to be formatted with its base, its hook and a method."""

BUILD = "def build(self, *given): {}"
HOOKS = {
    "OptimizerConfig": "optimizers", "AdamWConfig": "optimizers", "LRSchedulerConfig": "lr_schedulers",
    "NetworkConfig": "networks", "AttentionConfig": "attention_backends", "SaverConfig": "savers",
    "ObserverConfig": "observers",
}  # fmt: skip
"""The hook that registers a component with a base."""
Guest = Callable[..., Catalog]


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """Install a plugin with one component, and discover it."""

    def make(base: str, method: str, save: str = "pass") -> Catalog:
        # Modules are imported once in a process, so each needs a name of its own.
        module = f"misbehaving_{next(_numbers)}"
        source = GUEST.format(base=base, hook=HOOKS[base], method=method, save=save)
        install(tmp_path / "site", "odd-guest", **{module: source})
        monkeypatch.syspath_prepend(tmp_path / "site")
        return Catalog.discover()

    return make


def train_with(catalog: Catalog, tables: dict[str, Any], base: Path, **sections: Any) -> Path:
    """Train with the tables, some sections replaced."""
    return run_training(prepare(config_from_tables({**tables, **sections}, base, catalog)), catalog)


@pytest.mark.parametrize(
    ("base", "section", "body", "error"),
    [
        ("OptimizerConfig", "optimizer", "1 / 0", "failed in build: ZeroDivisionError: division by zero"),
        ("OptimizerConfig", "optimizer", "exit(3)", "failed in build: SystemExit: 3"),
        ("OptimizerConfig", "optimizer", "pass", "its build returned nothing, not a torch.optim.Optimizer"),
        ("LRSchedulerConfig", "lr_scheduler", "return 3", "an object of the class int, not an LRScheduler"),
        ("NetworkConfig", "network", "return [3]", "an object of the class list, not a Network"),
        ("AttentionConfig", "attention", "return 'sdpa'", "an object of the class str, not a function"),
        ("SaverConfig", "saver", "return open", "not a Saver, with save, load and a suffix"),
    ],
)
def test_who_is_to_blame(tables: dict[str, Any], guest: Guest, base: str, section: str, body: str, error: str) -> None:
    """A component that fails, or makes what is not of its kind, is an error that names it and its package."""
    catalog = guest(base, BUILD.format(body))
    with pytest.raises(PluginError) as caught:
        train_with(catalog, tables, Path(), **{section: {"name": "guest"}})
    assert "'guest' of odd-guest 1.0" in str(caught.value)
    assert error in str(caught.value)
    assert caught.value.exit_status == 2


def test_warnings_that_are_none(guest: Guest, tables: dict[str, Any], tmp_path: Path) -> None:
    """A component derived from a built-in one, whose warnings are no problems, is its own package's fault."""
    catalog = guest("AdamWConfig", "def warnings_with(self, config): return ['careful']")
    config = config_from_tables({**tables, "optimizer": {"name": "guest"}}, tmp_path, catalog)
    with pytest.raises(
        PluginError, match=r"'guest' of odd-guest 1\.0 failed in warnings_with: .*'careful', not a Prob"
    ):
        list(config.warnings())


def test_checks_that_fail_hide_no_other_problem(guest: Guest, tables: dict[str, Any], tmp_path: Path) -> None:
    """A component whose `problems` raises is told beside all that is wrong elsewhere in the config."""
    catalog = guest("AdamWConfig", "def problems(self): raise KeyError('lost')")
    with pytest.raises(ConfigError) as caught:
        config_from_tables({**tables, "optimizer": {"name": "guest"}, "loss": {"type": "l3"}}, tmp_path, catalog)
    optimizer, loss = sorted(map(str, caught.value.problems), key=lambda text: "loss.type" in text)
    assert "optimizer 'guest' of odd-guest 1.0 failed in problems: KeyError: 'lost'" in optimizer
    assert loss.startswith("loss.type")


def test_an_observer_that_cannot_be_built(
    guest: Guest, tables: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run continues without it and says so, unless it is essential."""
    catalog = guest("ObserverConfig", BUILD.format("raise RuntimeError('no display')"))
    tables["training"]["max_steps"] = 1
    assert train_with(catalog, tables, tmp_path, observers=[{"name": "guest"}]).exists()
    reason = "observer 'guest' of odd-guest 1.0 failed in build: RuntimeError: no display"
    assert reason in caplog.text
    essential = guest("ObserverConfig", f"essential = True\n    {BUILD.format('return 7')}")
    with pytest.raises(PluginError, match="an object of the class int, not an Observer"):
        train_with(essential, tables, tmp_path, observers=[{"name": "guest"}])


@pytest.mark.parametrize(
    ("save", "error", "text"),
    [
        ("raise ValueError('odd number')", PluginError, "saver 'guest' of odd-guest 1.0 failed in save: ValueError"),
        ("raise OSError(28, 'No space left on device')", NotSaved, "test.safetensors cannot be written: No space"),
    ],
)
def test_a_saver_that_fails(
    guest: Guest, tables: dict[str, Any], tmp_path: Path, save: str, error: type[Exception], text: str
) -> None:
    """A saver that raises is named with its package; a disk that is full is not its fault."""
    catalog = guest("SaverConfig", BUILD.format("return FailingSaver(self.precision)"), save)
    tables["training"]["max_steps"] = 1
    with pytest.raises(error, match=text):
        train_with(catalog, tables, tmp_path, saver={"name": "guest"})


def test_what_the_command_says(guest: Guest, tables: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    """A failing component ends the command with 2 and one message; where it came from is shown with --debug."""
    guest("OptimizerConfig", BUILD.format("raise ValueError('odd number')"))
    path = write_config(tables, tmp_path, optimizer={"name": "guest"})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    command = [sys.executable, "-m", "lorakit", "train", str(path)]
    plain, debug = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=False) for more in ([], ["--debug"])
    )
    assert (plain.returncode, debug.returncode) == (2, 2)
    assert "error: optimizer 'guest' of odd-guest 1.0 failed in build: ValueError: odd number" in plain.stderr
    assert "Traceback" not in plain.stderr
    assert "in build" in debug.stderr
    assert "Traceback" in debug.stderr


class Meddler(Observer):
    """Reseeds PyTorch and draws numbers after each step."""

    def step_finished(self, step: int) -> None:
        """Sets the seed and draws."""
        torch.manual_seed(step)
        torch.rand(step)


def test_an_observer_that_draws_random_numbers(make_config) -> None:
    """What is trained is the same, bit for bit."""

    def trained(*observers: tuple[str, bool, Observer]) -> dict[str, torch.Tensor]:
        run = build_run(prepare(make_config(network={"dropout": 0.1})), Distributed(torch.device("cpu")))
        train(RunHandle(run, Observers(observers)))
        return run.network.adapter_state()

    alone, observed = trained(), trained(("meddler", False, Meddler()))
    assert same(alone, observed)
