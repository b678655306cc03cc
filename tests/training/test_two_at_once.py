"""Two runs at the same time: of one name in one folder the second is refused; a cache may be shared."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorakit.config.train_config import OutputSection
from lorakit.errors import OutputError
from lorakit.training.output.folder import run_lock
from tests.training.test_runs import run_lorakit, same, weights_of, write_config


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command, going on in a process of its own."""
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@contextmanager
def running(path: Path, saved: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has saved a first file and goes on; killed without notice at the end."""
    process = start("train", path, "--set", "training.max_steps=100000", "--set", "output.save_every_n_steps=1")
    try:
        while not saved.exists() and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_the_second_run_of_a_name_is_refused(tables: dict[str, Any], tmp_path: Path) -> None:
    """While a run goes on, another of its name is refused and told of it, one of another name is not.

    When the first is killed, its place is free at once, and the run that takes it leaves no lock behind.
    """
    path, out = write_config(tables, tmp_path, training={"max_steps": 1}), tmp_path / "out"
    with running(path, out / "test-step00000001.safetensors") as first:
        refused = run_lorakit("train", path)
        assert refused.returncode == 2
        assert f"output.name: another run is writing 'test' to {out}: process {first.pid} on" in refused.stderr
        assert socket.gethostname() in refused.stderr
        assert "another output.name or output.dir" in refused.stderr
        assert "Traceback" not in refused.stderr
        other = run_lorakit("train", path, "--set", "output.name=other")
        assert other.returncode == 0, other.stderr
        assert first.poll() is None
    assert (out / ".test.lock").exists()
    again = run_lorakit("train", path)
    assert again.returncode == 0, again.stderr
    assert not list(out.glob("*.lock"))
    assert not list(out.glob(".*.lock"))


def test_two_runs_fill_one_cache(tables: dict[str, Any], tmp_path: Path) -> None:
    """Two runs that start with the same empty cache end with the same weights, and leave a whole cache, no scraps."""
    cache = tmp_path / "own-cache"
    path = write_config(tables, tmp_path, data={"cache_dir": str(cache)}, network={"parts": ["unet"]})
    both = [start("train", path, "--set", f"output.name={name}") for name in ("one", "two")]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert same(*(weights_of(tmp_path / "out" / f"{name}.safetensors") for name in ("one", "two")))
    files = [file for file in cache.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert all(load_file(file) for file in files if file.suffix == ".safetensors")
    assert len(json.loads((cache / "files.json").read_bytes())["files"]) > 4


def test_one_process_locks_too(tmp_path: Path) -> None:
    """Two runs in one process are told apart like those of two."""
    output = OutputSection(dir=tmp_path / "out", name="a")
    with run_lock(output):
        with pytest.raises(OutputError, match="another run is writing 'a'"), run_lock(output):
            pass
        with run_lock(OutputSection(dir=tmp_path / "out", name="b")):
            assert (tmp_path / "out" / ".b.lock").exists()
    with run_lock(output):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_where_nothing_can_be_locked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A lock that cannot be had is warned of, and the run goes on."""
    (tmp_path / ".a.lock").mkdir()
    with run_lock(OutputSection(dir=tmp_path, name="a")):
        pass
    assert f"{tmp_path} cannot be locked" in caplog.text
