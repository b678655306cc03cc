"""What is said of fp16 on machines without an accelerator, and how long processes wait for each other."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakit.config.train_config import TrainingSection
from lorakit.training.prepare import prepare
from lorakit.training.runtime import hardware
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from tests.training.conftest import MakeConfig


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Linux machine of which only a folder is looked at, an empty one, which is also where programs are."""
    monkeypatch.setattr(hardware, "_SIGNS", [str(tmp_path / "dev")])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("device", "precision", "reason"),
    [
        ("cpu", "fp16", 'training.device is "cpu"'),
        ("auto", "fp16", "no accelerator was found"),
        ("cuda", "fp16", None),
        ("cpu", "bf16", None),
        ("auto", "no", None),
    ],
)
def test_fp16_on_a_cpu(bare: Path, device: str, precision: str, reason: str | None) -> None:
    """Without a sign of an accelerator, fp16 is doubted with the reason; a device that is named is believed."""
    doubts = hardware.hardware_warnings(TrainingSection(device=device, mixed_precision=precision))
    assert len(doubts) == (reason is not None)
    for doubt in doubts:
        assert doubt.key == "training.mixed_precision"
        assert doubt.message.startswith(reason)
        assert doubt.hint == 'use "no", or "bf16" for less memory'


@pytest.mark.parametrize("sign", ["driver", "program", "platform"])
def test_a_sign_is_enough(sign: str, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of a driver, its tool, or a system that tells nothing, and no doubt is raised."""
    if sign == "driver":
        (bare / "dev").touch()
    elif sign == "program":
        shutil.copy("/bin/sh", bare / "nvidia-smi")
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
    keys = [doubt.key for doubt in hardware.hardware_warnings(TrainingSection(mixed_precision="fp16"))]
    assert "training.mixed_precision" not in keys


@pytest.mark.parametrize(("device", "sign"), [("cpu", False), ("auto", True)])
def test_it_is_said_once(
    device: str, sign: bool, bare: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A run is warned once: before torch is imported, or, where a driver raised hopes, when PyTorch finds nothing."""
    if sign:
        (bare / "dev").touch()
    prepared = prepare(make_config(training={"mixed_precision": "fp16", "device": device}))
    build_run(prepared, Distributed(torch.device("cpu")))
    said = [*map(str, prepared.warnings), caplog.text]
    assert "".join(said).count('"fp16" is slow on a CPU') == 1
    assert ("PyTorch finds no accelerator" in caplog.text) is sign


WAITING = """
import sys, time
from lorakit.training.runtime.distributed import Distributed

processes = Distributed.init("cpu", timeout=float(sys.argv[1]))
if processes.rank == 1:
    time.sleep(6)
processes.barrier()
print("met", processes.rank)
"""


@pytest.mark.parametrize(("minutes", "met"), [(1.0, True), (0.05, False)])
def test_processes_wait_so_long(minutes: float, met: bool, tmp_path: Path) -> None:
    """A process that has waited for another for `process_timeout` minutes gives up."""
    (tmp_path / "waiting.py").write_text(WAITING)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    group = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "waiting.py", str(minutes)],
            env={**group, "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    results = [process.communicate(timeout=120) for process in processes]
    assert ("met 0" in results[0][0]) is met, results
    assert ("imed out" in results[0][1]) is not met, results[0][1]
