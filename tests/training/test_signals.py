"""Ctrl-C and SIGTERM at any moment of the command: never a traceback, never half a file, status 130."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from safetensors.torch import load_file

from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.signals import GRACE
from lorakit.training.setup import build_run


def begun(tables: dict[str, Any], folder: Path, *options: str) -> subprocess.Popen[str]:
    """A long run in a process of its own, with a cache of its own."""
    data = {**tables["data"], "cache_dir": str(folder / "cache")}
    path = folder / "config.toml"
    path.write_text(tomlkit.dumps({**tables, "data": data, "training": {"max_steps": 10_000, "device": "cpu"}}))
    command = [sys.executable, "-m", "lorakit", "train", str(path), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=folder)


def wait_for(process: subprocess.Popen[str], happened: Callable[[], object]) -> None:
    """Return when something has happened, or the process has ended."""
    while process.poll() is None and not happened():
        time.sleep(0.005)


def ended(process: subprocess.Popen[str], folder: Path) -> str:
    """What the process said, once it has ended as it should and left whole files."""
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Error" not in errors
    for path in folder.rglob("[!.]*.safetensors"):
        if not any(parent.name.startswith(".") for parent in path.parents):
            load_file(path)
    return errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["import", "encoding", "assembly"])
def test_before_the_first_step(number: signal.Signals, moment: str, tables: dict[str, Any], tmp_path: Path) -> None:
    """While packages are imported, images are encoded or the model is read, the command stops at once."""
    process = begun(tables, tmp_path)
    happened = {
        "import": lambda: "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text(),
        "encoding": lambda: list(tmp_path.glob("cache/*/*")),
        "assembly": lambda: list(tmp_path.glob("cache/files.json")),
    }
    wait_for(process, happened[moment])
    process.send_signal(number)
    errors = ended(process, tmp_path)
    assert "Stopped." in errors or "Stopped after step" in errors
    assert not (tmp_path / "out" / "test.safetensors").exists()


def test_a_second_one_stops_at_once(tables: dict[str, Any], tmp_path: Path) -> None:
    """While a step is finished, or a state is saved, a second signal ends the command with no state or a whole one."""
    process = begun(tables, tmp_path, "--set", "output.save_every_n_steps=1")
    wait_for(process, lambda: list(tmp_path.glob("out/test-step*.safetensors")))
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    errors = ended(process, tmp_path)
    assert time.monotonic() - begin < 30
    assert re.search(r"Stopped at step \d+ of 10000; the last save is of step \d+: |Stopped after step ", errors)
    for state in tmp_path.glob("out/test-state/step*"):
        assert {path.name for path in state.iterdir()} == {"state.json", "network.safetensors", "machinery.safetensors"}


def test_more_of_them_while_the_command_ends(tables: dict[str, Any], tmp_path: Path) -> None:
    """Signals that come when a state is saved, until the process is gone, change neither its status nor its words."""
    process = begun(tables, tmp_path, "--set", "output.save_every_n_steps=1")
    wait_for(process, lambda: list(tmp_path.glob("out/test-step*.safetensors")))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    said = ""
    while not said.endswith("Stopped after step"):
        letter = process.stderr.read(1)
        assert letter, said
        said += letter
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    ended(process, tmp_path)


def test_a_second_one_before_anything_is_saved(tables: dict[str, Any], tmp_path: Path) -> None:
    """What was trained is lost, and that is said."""
    process = begun(tables, tmp_path)
    assert process.stderr is not None
    said = ""
    while not re.search(r" step \d+/10000 ", said):
        letter = process.stderr.read(1)
        assert letter, said
        said += letter
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    errors = ended(process, tmp_path)
    assert re.search(r"Stopped at step \d+ of 10000; nothing was saved since the start\.|Stopped after step ", errors)


def test_what_is_said_of_a_resumed_run(make_config) -> None:
    """A resumed run that is stopped at once says since which step nothing was saved, or what was."""
    run = build_run(prepare(make_config()), Distributed(torch.device("cpu")))
    run.first_step, run.step = 2, 4
    assert run.stop.status() == "Stopped at step 4 of 6; nothing was saved since step 2, from which it was resumed."
    path = run.save_adapter("test")
    run.step = 5
    assert run.stop.status() == f"Stopped at step 5 of 6; the last save is of step 4: {path}"


BUSY = """
import hashlib
from lorakit.training.runtime.signals import StopRequest
with StopRequest().listening():
    print("listening", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
"""An operation of many minutes that lets no handler of Python's run."""


def test_second_signal_within_one_long_operation() -> None:
    """The first signal lets an operation go on; the second ends the process with 130, though Python gets no turn."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"listening\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3 * GRACE)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.endswith(b"\nStopped.\n")
