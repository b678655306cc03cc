"""Ctrl-C and SIGTERM at any moment of the command: never a traceback, never half a file, status 130.

A second one, while a run finishes its step, kills the process.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from safetensors.torch import load_file


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


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Read what a process says on standard error until it says this."""
    assert process.stderr is not None
    said = ""
    while text not in said:
        letter = process.stderr.read(1)
        assert letter, said
        said += letter


def ended(process: subprocess.Popen[str], folder: Path, *statuses: int) -> str:
    """What the process said, once it has ended with 130, or one of these, and left whole files."""
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode in (130, *statuses), errors
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


@pytest.mark.parametrize("pause", [0.0, 0.05])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_kills_at_once(
    second: signal.Signals, pause: float, tables: dict[str, Any], tmp_path: Path
) -> None:
    """While a step is finished, or a state is saved, a second signal kills the process: no state, or a whole one."""
    process = begun(tables, tmp_path, "--set", "output.save_every_n_steps=1")
    wait_for(process, lambda: list(tmp_path.glob("out/test-step*.safetensors")))
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    read_until(process, "once more stops at once")
    time.sleep(pause)
    process.send_signal(second)
    errors = ended(process, tmp_path, -second)
    assert time.monotonic() - begin < 30
    if process.returncode == 130:
        assert "Stopped after step " in errors
    for state in tmp_path.glob("out/test-state/step*"):
        assert {path.name for path in state.iterdir()} == {"state.json", "network.safetensors", "optimizer.safetensors"}


def test_more_of_them_while_the_command_ends(tables: dict[str, Any], tmp_path: Path) -> None:
    """Signals that come when the state is saved, until the process is gone, change neither its status nor its words."""
    process = begun(tables, tmp_path, "--set", "output.save_every_n_steps=1")
    wait_for(process, lambda: list(tmp_path.glob("out/test-step*.safetensors")))
    process.send_signal(signal.SIGINT)
    read_until(process, "Stopped after step")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    ended(process, tmp_path)


BUSY = """
import hashlib
import time
from lorakit.training.runtime.signals import StopRequest
with StopRequest().listening():
    print("listening", flush=True)
    while True:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)
"""
"""Operations of some seconds that let no handler of Python's run."""


def test_second_signal_within_a_long_operation() -> None:
    """The first signal lets work continue; the second kills the process, though Python gets no turn."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    process.send_signal(signal.SIGTERM)
    read_until(process, "SIGTERM: finishing this step")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=60) == -signal.SIGINT
    finally:
        process.kill()
