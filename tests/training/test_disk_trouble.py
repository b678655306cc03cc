"""Folders that take no files in the middle of a run: what is said, what is kept, and how the run goes on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch

import lorakit
from lorakit.api.observer import Observer
from lorakit.config.train_config import TrainConfig
from lorakit.errors import Interrupted, NotSaved, OutputError
from lorakit.plugins.catalog import Catalog
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import add_observers, build_run, fill_cache, run_training
from tests.training.conftest import MakeConfig
from tests.training.test_runs import same, weights_of

SAVING = {"save_every_n_steps": 1, "save_state": True, "keep_last": 2}


class Doing(Observer):
    """Does something at the end of steps."""

    def __init__(self, doings: dict[int, Callable[[], object]]) -> None:
        self.doings = doings

    def step_finished(self, step: int) -> None:
        """Do what is to be done after this step."""
        self.doings.get(step, lambda: None)()


def train_doing(config: TrainConfig, catalog: Catalog, doings: dict[int, Callable[[RunHandle], object]]) -> None:
    """Train, and do something after some steps, before they are saved."""
    handle = RunHandle(build_run(prepare(config), Distributed(torch.device("cpu"))))
    add_observers(handle, catalog)
    doing = Doing({step: partial(do, handle) for step, do in doings.items()})
    handle.observers.add("doing", doing, essential=True, first=True)
    train(handle)


def block(folder: Path) -> None:
    """Put a file in the place of a folder, so that nothing can be written there."""
    folder.rename(folder.with_name("aside"))
    folder.touch()


def unblock(folder: Path) -> None:
    """Put the folder back."""
    folder.unlink()
    folder.with_name("aside").rename(folder)


def steps_saved(folder: Path) -> list[int]:
    """The steps of which there are LoRA files in a folder, and of which there are states."""
    return sorted(int(path.stem.split("step")[1]) for path in folder.glob("test-step*.safetensors"))


def test_a_folder_that_takes_nothing_for_a_while(
    make_config: MakeConfig, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    """Each save that fails is told, once; what was saved is kept, the run goes on and ends with the same weights."""
    whole = weights_of(lorakit.train(make_config(output={"name": "whole"})))
    config = make_config(output=SAVING)
    out, during = config.output.dir, []

    def look(_: RunHandle) -> None:
        during.append(steps_saved(out.with_name("aside")))

    train_doing(config, catalog, {3: lambda _: block(out), 4: look, 5: lambda _: unblock(out)})
    assert during == [[1, 2]]
    assert steps_saved(out) == [2, 5]
    assert [path.name for path in (out / "test-state").iterdir()] == ["step00000006"]
    assert same(whole, weights_of(out / "test.safetensors"))
    told = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(told) == 4  # two files and two states
    assert all(text.endswith("Training continues, and the next save tries again.") for text in told)
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_a_folder_that_vanishes(make_config: MakeConfig, catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    """It is made again at the next save."""
    config = make_config(output=SAVING)
    train_doing(config, catalog, {3: lambda _: shutil.rmtree(config.output.dir)})
    assert steps_saved(config.output.dir) == [4, 5]
    assert (config.output.dir / "test.safetensors").exists()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_last_save_goes_elsewhere(
    make_config: MakeConfig, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that the output folder does not take is put where the command was called, and the message says so."""
    whole = weights_of(lorakit.train(make_config(output={"name": "whole"})))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(output={"save_state_at_end": True})
    with pytest.raises(NotSaved, match=r"All steps are done, but .*out/test\.safetensors cannot be written:") as caught:
        train_doing(config, catalog, {6: lambda _: block(config.output.dir)})
    (file,) = (tmp_path / "here").glob("test-*/test.safetensors")
    (state,) = (tmp_path / "here").glob("test-*/step00000006")
    assert f"it is in {file}." in str(caught.value)
    assert f"it is in {state}." in str(caught.value)
    assert same(whole, weights_of(file))
    assert caught.value.exit_status == 1


def test_a_stopped_run_saves_its_state_elsewhere(
    make_config: MakeConfig, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that the output folder does not take is put elsewhere, and the run goes on from there."""
    whole = weights_of(lorakit.train(make_config(output={"name": "whole"})))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = make_config()

    def stop(handle: RunHandle) -> None:
        handle.stop.signalled = True
        config.output.dir.mkdir(exist_ok=True)
        block(config.output.dir)

    with pytest.raises(Interrupted) as caught:
        train_doing(config, catalog, {3: stop})
    (state,) = (tmp_path / "here").glob("test-*/step00000003")
    assert (caught.value.state, caught.value.is_found) == (state, False)
    assert str(state) in str(caught.value)
    unblock(config.output.dir)
    assert same(whole, weights_of(run_training(prepare(config), catalog, resume=state)))


def test_a_cache_that_takes_nothing(
    make_config: MakeConfig, catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run keeps in memory what it encodes, says so once, and ends the same; to fill the cache alone is refused."""
    config = make_config(data={"cache_dir": str(tmp_path / "file" / "cache")})
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="safetensors cannot be written: Not a directory"):
        fill_cache(prepare(config))
    trained = run_training(prepare(config), catalog)
    assert caplog.text.count("what is encoded is kept in memory") == 1
    assert same(weights_of(trained), weights_of(lorakit.train(make_config(output={"name": "usual"}))))


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
from lorakit.__main__ import main
main()
"""


@pytest.mark.parametrize("saves", [True, False])
def test_a_full_disk(saves: bool, make_config: MakeConfig, tables: dict[str, Any], tmp_path: Path) -> None:
    """Where LoRA files just fit and states do not, the files are there; where nothing fits, that is said, status 1."""
    size = lorakit.train(make_config(output={"name": "usual"})).stat().st_size
    (tmp_path / "config.toml").write_text(tomlkit.dumps({**tables, "output": {**tables["output"], **SAVING}}))
    code = FULL_DISK.format(size=size + 4096 if saves else size // 2)
    command = [sys.executable, "-c", code, "train", str(tmp_path / "config.toml")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    out = tmp_path / "out"
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "error: All steps are done, but " in last
    assert ("test.safetensors cannot be written" in last) == (not saves)
    assert "so it is lost; earlier saves are kept" in last
    assert result.stderr.count("cannot be written: File too large") >= 6
    assert steps_saved(out) == ([4, 5] if saves else [])
    assert (out / "test.safetensors").exists() == saves
    if saves:
        assert same(weights_of(out / "test.safetensors"), weights_of(out / "usual.safetensors"))
    assert not list((out / "test-state").iterdir())
    assert not list(tmp_path.glob("test-*"))
