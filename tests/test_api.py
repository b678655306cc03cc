"""`lorakit.train`, `check` and `plan` from Python: configs of three kinds, observers, and stopping."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.api.observer import Observer, RunInfo, StepMetrics
from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError, DataError, Interrupted
from lorakit.training.checkpoint.state import state_folder, states_in
from tests.training.test_runs import same, weights_of, write_config


class Noting(Observer):
    """Notes the steps and losses; may set an event after a step."""

    def __init__(self, stop: threading.Event | None = None, last: int = 0) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.info: RunInfo | None = None
        self.is_closed = False
        self._stop, self._last = stop, last

    def run_started(self, run: RunInfo) -> None:
        """Noted."""
        self.info = run

    def step_finished(self, step: int) -> None:
        """Noted."""
        self.steps.append(step)
        if self._stop is not None and step == self._last:
            self._stop.set()

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Noted."""
        self.losses.append(metrics.loss)

    def closed(self) -> None:
        """Noted."""
        self.is_closed = True


def test_three_kinds_of_configs(train_tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, the tables of one and a config value train the same; tables may hold paths, tuples and None."""
    photos = Path(train_tables["data"]["image_dir"])
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    value = lorakit.train(config_from_tables(train_tables, tmp_path))
    file = lorakit.train(write_config(train_tables, tmp_path), overrides=["output.name=file"])
    tables = {name: dict(section) for name, section in train_tables.items()}
    tables["model"]["path"] = Path(tables["model"]["path"])
    tables["data"]["image_dir"] = Path("photos")
    tables["output"] |= {"name": "tables", "dir": Path("out"), "save_every_n_steps": None}
    mapping = lorakit.train(tables)
    assert mapping == tmp_path / "out" / "tables.safetensors"
    assert same(weights_of(value), weights_of(file))
    assert same(weights_of(value), weights_of(mapping))
    assert tables["output"]["dir"] == Path("out")


def test_observers_are_handed_in(train_tables: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Observers hear of the whole run; one that fails is named and the run goes on; strange objects are refused."""

    class Broken(Observer):
        def step_finished(self, step: int) -> None:
            raise ZeroDivisionError(step)

    noting = Noting()
    lorakit.train(train_tables, observers=[Broken(), noting])
    assert noting.info is not None
    assert noting.steps == list(range(1, noting.info.total_steps + 1))
    assert len(noting.losses) == len(noting.steps)
    assert noting.is_closed
    assert caplog.text.count("observer 'Broken' failed and is detached: ZeroDivisionError") == 1
    with pytest.raises(TypeError, match=r"must be instances of lorakit\.api\.Observer, not of Noting"):
        lorakit.train(train_tables, observers=[type("Noting", (), {})()])


def test_stopping_from_an_observer(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """An event ends the run after the step with a state, which it can go on from to the same end."""
    whole = lorakit.train(train_tables)
    tables = {**train_tables, "output": {**train_tables["output"], "name": "stopped"}}
    stop = threading.Event()
    with pytest.raises(Interrupted) as caught:
        lorakit.train(tables, observers=[Noting(stop, 2)], stop=stop)
    (state,) = states_in(state_folder(config_from_tables(tables, tmp_path)))
    assert caught.value.state == state
    assert str(caught.value).startswith("Stopped after step 2 of ")
    assert str(caught.value).endswith(f"The state is in {state}")
    noting = Noting()
    resumed = lorakit.train(tables, resume=caught.value.state, observers=[noting])
    assert noting.steps[0] == 3
    assert same(weights_of(whole), weights_of(resumed))


def test_stopping_from_another_thread(train_tables: dict[str, Any]) -> None:
    """A run in a thread, where no signal can be listened to, is stopped by the main one."""
    stop, begun, ends = threading.Event(), threading.Event(), []
    train_tables["training"]["max_steps"] = 100_000
    noting = Noting(begun, 1)

    def run() -> None:
        try:
            lorakit.train(train_tables, observers=[noting], stop=stop)
        except Interrupted as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(120)
    stop.set()
    thread.join(120)
    assert [error.state.is_dir() for error in ends] == [True]
    assert noting.is_closed


def test_a_run_that_is_stopped_at_once(train_tables: dict[str, Any]) -> None:
    """An event that is set before the first step ends the run before anything is encoded, and no file is written."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match=r"^Stopped before the first step\.$") as caught:
        lorakit.train(train_tables, stop=stop)
    assert caught.value.state is None
    assert not Path(train_tables["output"]["dir"]).exists()


def test_check(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """A config without problems gives numbers and warnings; problems and bad files are raised as for training."""
    train_tables["training"] = {"max_epochs": 3, "device": "cpu", "compile_backend": "eager"}
    train_tables["data"]["validation_split"] = 0.25
    checked = lorakit.check(train_tables)
    assert (checked.images, checked.held_out) == (3, 1)
    assert checked.epochs == 3
    assert checked.steps == 3 * checked.steps_per_epoch
    assert "training.compile_backend" in [own.key for own in checked.warnings]
    assert checked.config.training.max_epochs == 3
    longer = lorakit.check(write_config(train_tables, tmp_path), overrides=["training.max_epochs=5"])
    assert longer.steps == 5 * checked.steps_per_epoch
    with pytest.raises(ConfigError, match="netwrok"):
        lorakit.check({**train_tables, "netwrok": {}})
    with pytest.raises(DataError):
        lorakit.check({**train_tables, "data": {**train_tables["data"], "image_dir": str(tmp_path)}})
    with pytest.raises(TypeError, match="overrides are for config files"):
        lorakit.check(train_tables, overrides=["training.max_epochs=5"])


def test_check_imports_no_torch(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """Checking from Python is as light as the command."""
    path = write_config(train_tables, tmp_path)
    program = f"import sys, lorakit; lorakit.check({str(path)!r}); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("own", "spins"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
    ],
)
def test_threads_that_wait_sleep_soon(own: dict[str, str], spins: str) -> None:
    """OpenMP's threads leave the cores to other programs, unless the user says how they are to wait."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | own
    result = subprocess.run(
        [sys.executable, "-c", "import lorakit, torch"],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in result.stderr:
        pytest.skip("PyTorch computes with another OpenMP here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has it on Linux only")
@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
        ({"PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ],
)
def test_memory_of_gpus_grows_in_segments(own: dict[str, str], found: str) -> None:
    """PyTorch's allocator is set up before PyTorch is there, unless the user has done it."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")} | own
    program = "import os, lorakit; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == found


def test_plan(train_tables: dict[str, Any]) -> None:
    """A plan has the length of the run and its memory."""
    made = lorakit.plan(train_tables)
    assert made.schedule.total_steps == lorakit.check(train_tables).steps
    assert made.current.memory.peak > 0
    assert made.timing is None


def test_warnings_are_logged(train_tables: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """What a command would print as a warning is logged once."""
    train_tables["training"] |= {"compile_backend": "eager"}
    caplog.set_level(logging.WARNING, "lorakit")
    lorakit.train(train_tables)
    assert caplog.text.count("training.compile_backend: has no effect") == 1
