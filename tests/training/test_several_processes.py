"""Runs of several processes on CPUs: what they do where one of them has no share, and how they begin and end."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import lorakit
from lorakit.errors import ConfigError
from lorakit.training.runtime.distributed import Distributed
from tests.training.conftest import MakeConfig
from tests.training.test_runs import same, weights_of, write_config


def free_port() -> str:
    """A port on which processes can meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def together(program: Path, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """A program on two processes that know of each other, as torchrun starts them."""
    group = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    command = [sys.executable, str(program), *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **group, "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    results = [process.communicate(timeout=240) for process in processes]
    return [
        subprocess.CompletedProcess(command, process.returncode, *texts)
        for process, texts in zip(processes, results, strict=True)
    ]


@pytest.fixture
def one_image(photographs: Path, tmp_path: Path) -> Path:
    """A folder with one image, of which a second process has no share."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(photographs.glob("*"))[:2]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.usefixtures("lorakit_one_thread")
def test_each_process_measures_for_itself(
    one_image: Path, tables: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    """A process that has no share of the first micro-batch measures no mode, and none waits for it to."""
    sections: dict[str, Any] = {"data": {"image_dir": str(one_image)}, "training": {"max_steps": 3}}
    path = write_config(tables, tmp_path, **sections)
    options = ["--cpu", "--num_processes", "2", "--main_process_port", free_port()]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "lorakit", "train", str(path)]
    modes = [f"--set=training.{key}=auto" for key in ("channels_last", "cuda_graphs", "compile")]
    several = subprocess.run([*command, *modes], capture_output=True, text=True, timeout=240, check=False)
    assert several.returncode == 0, several.stderr
    assert several.stderr.count("a micro-batch takes") == 1
    assert sorted(re.findall(r"rank (\d) +CPU of \S+, 1/2 of each batch", several.stderr)) == ["0", "1"]
    sections["data"]["batch_size"] = 2
    alone = weights_of(lorakit.train(make_config(**sections, output={"name": "alone"})))
    assert same(weights_of(tmp_path / "out" / "test.safetensors"), alone)


TWO_RUNS = """
import atexit, sys
import torch
atexit.register(lambda: print("left", not torch.distributed.is_initialized()))
import lorakit

for name, rate in {"one": "1e-3", "two": "x"}.items():
    try:
        lorakit.train(sys.argv[1], overrides=[f"output.name={name}", f"optimizer.lr={rate}"])
    except lorakit.errors.ConfigError:
        print("refused")
lorakit.train(sys.argv[1], overrides=["output.name=three"])
"""


def test_processes_part_at_the_end(tables: dict[str, Any], tmp_path: Path) -> None:
    """One program may train several times on the same processes, which leave their group when it ends."""
    path = write_config(tables, tmp_path, training={"max_steps": 2})
    program = tmp_path / "program.py"
    program.write_text(TWO_RUNS)
    for result in together(program, path):
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == ["refused", "left", "True"]
        assert "destroy_process_group" not in result.stderr
    assert {own.stem for own in (tmp_path / "out").glob("*.safetensors")} == {"one", "three"}


SHARED = """
import sys
import lorakit
from lorakit.api import Observer
from lorakit.previews import previews
from lorakit.training import validation

class Noting(Observer):
    def validated(self, step, losses):
        print("loss", step, losses["average"])

def noting(module, name, count):
    original = getattr(module, name)
    def noted(*args):
        result = original(*args)
        print(name, count(*args, result), file=sys.stderr)
        return result
    setattr(module, name, noted)

noting(validation, "_losses", lambda run, loaded, losses: len(losses))
noting(previews, "sample_latents", lambda model, jobs, *_: len(jobs))
lorakit.train(sys.argv[1], observers=[Noting()], overrides=sys.argv[2:])
"""


def pictures_of(folder: Path) -> list[NDArray[np.uint8]]:
    """The previews in a folder, in the order of steps and prompts."""
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("sample/test_0*.png"))]


def test_previews_and_validation_are_shared(tables: dict[str, Any], tmp_path: Path) -> None:
    """Each process draws and validates a part; the main one tells and writes the whole, as one process would."""
    prompts = ["a cat", "a dog --d 3", "sand --w 64 --h 96"]
    samples = {"name": "samples", "prompts": prompts, "at_first": True, "steps": 2, "width": 64, "height": 64}
    sections = {"data": {"validation_split": 0.5}, "training": {"max_steps": 1}}
    path = write_config(tables, tmp_path, **sections, observers=[samples])  # type: ignore[arg-type]
    program = tmp_path / "program.py"
    program.write_text(SHARED)
    command = [sys.executable, str(program), str(path), "data.batch_size=2", f"output.dir={tmp_path / 'one'}"]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert alone.returncode == 0, alone.stderr
    main, other = together(program, path, "data.batch_size=1", f"output.dir={tmp_path / 'two'}")
    for result in (main, other):
        assert result.returncode == 0, result.stderr
    counts = [re.findall(r"^(_losses|sample_latents) (\d+)$", run.stderr, re.MULTILINE) for run in (alone, main, other)]
    assert counts == [
        [("sample_latents", "3"), ("_losses", "4"), ("sample_latents", "3")],
        [("sample_latents", "2"), ("_losses", "4"), ("sample_latents", "2")],
        [("sample_latents", "1"), ("_losses", "4"), ("sample_latents", "1")],
    ]
    assert other.stdout == ""
    (step, loss), (_, expected) = (re.fullmatch(r"loss (\d+) (\S+)\n", run.stdout).groups() for run in (main, alone))
    assert step == "1"
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    ours, theirs = pictures_of(tmp_path / "two"), pictures_of(tmp_path / "one")
    assert len(ours) == len(theirs) == 6
    assert all(np.array_equal(*pair) for pair in zip(ours[:3], theirs[:3], strict=True))
    assert all(np.abs(one - other.astype(int)).max() <= 2 for one, other in zip(ours, theirs, strict=True))
    assert len(list((tmp_path / "two").glob("sample/*_contact_sheet.png"))) == 1


@pytest.mark.usefixtures("lorakit_one_thread")
def test_gradients_summed_in_bf16(tables: dict[str, Any], make_config: MakeConfig, tmp_path: Path) -> None:
    """`reduce_dtype` changes what is trained by about a rounding to 8 bits, and all processes get the same sum."""
    # With SGD updates are proportional to gradients; nothing is clipped.
    sections: dict[str, Any] = {
        "optimizer": {"name": "sgdnesterov", "lr": 1.0}, "training": {"max_steps": 2, "max_grad_norm": 0},
    }  # fmt: skip
    path = write_config(tables, tmp_path, **sections)
    program = tmp_path / "program.py"
    program.write_text(SUMMED)
    alone = weights_of(lorakit.train(make_config(**sections, data={"batch_size": 2}, output={"name": "alone"})))
    results = together(program, path, "data.batch_size=1", "training.reduce_dtype=bf16")
    assert all(result.returncode == 0 for result in results), results[0].stderr
    digests = {result.stdout for result in results}
    assert len(digests) == 1
    found = weights_of(tmp_path / "out" / "test.safetensors")
    ups = [(found[name], own) for name, own in alone.items() if "lora_up" in name]
    off, moved = (torch.cat([*map(torch.flatten, parts)]) for parts in ([a - b for a, b in ups], [b for _, b in ups]))
    assert 2**-12 < off.norm() / moved.norm() < 2**-7  # float32 sums would stay below


SUMMED = """
import hashlib, sys
import lorakit
from lorakit.training.step.gradients import FlatGradients

original = FlatGradients.all_reduce
def noted(self, *args, **options):
    original(self, *args, **options)
    print(hashlib.sha256(self.buffer.numpy().tobytes()).hexdigest())
FlatGradients.all_reduce = noted
lorakit.train(sys.argv[1], overrides=sys.argv[2:])
"""


def test_moving_average(tables: dict[str, Any], make_config: MakeConfig, tmp_path: Path) -> None:
    """Each process holds the same average of the steps, which one process with all of the batch would save."""
    sections: dict[str, Any] = {
        "network": {"rank": 2, "ema": 0.6},
        "optimizer": {"name": "sgdnesterov", "lr": 1.0},
        "training": {"max_steps": 3},
    }
    path = write_config(tables, tmp_path, **sections)
    program = tmp_path / "program.py"
    program.write_text(AVERAGED)
    alone = weights_of(lorakit.train(make_config(**sections, data={"batch_size": 2}, output={"name": "alone"})))
    results = together(program, path, "data.batch_size=1")
    assert all(result.returncode == 0 for result in results), results[0].stderr
    digests = [result.stdout.split() for result in results]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 3
    found = weights_of(tmp_path / "out" / "test.safetensors")
    assert found.keys() == alone.keys()
    ups = [(found[name], own) for name, own in alone.items() if "lora_up" in name]
    off, moved = (torch.cat([*map(torch.flatten, parts)]) for parts in ([a - b for a, b in ups], [b for _, b in ups]))
    # Sums over one image or two are rounded otherwise, and this model's norms over few numbers make more of that.
    assert off.norm() < 1e-3 * moved.norm()


AVERAGED = """
import hashlib, sys
import lorakit
from lorakit.training.step.moving_average import MovingAverage

original = MovingAverage.update
def noted(self, *args):
    original(self, *args)
    print(hashlib.sha256(self.average.numpy().tobytes()).hexdigest())
MovingAverage.update = noted
lorakit.train(sys.argv[1], overrides=sys.argv[2:])
"""


FAILING = """
from lorakit.errors import LorakitError, OutputError
from lorakit.training.runtime.distributed import Distributed

processes = Distributed.init("auto")
for kind in (OutputError, ZeroDivisionError):
    def work():
        if processes.rank == 1:
            raise kind("no room")
        return processes.rank
    try:
        processes.together(work)
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
try:
    processes.together(lambda: 10 if processes.rank else lambda: 10)
except Exception as error:
    print("another failed" if isinstance(error, RuntimeError) else "cannot be sent")
print(processes.together(lambda: 10 * processes.rank))
"""


def test_processes_fail_together(tmp_path: Path) -> None:
    """What raises on one process raises on the others, of the kind that matters to who catches it; then all go on."""
    program = tmp_path / "program.py"
    program.write_text(FAILING)
    main, other = together(program)
    assert main.stdout.splitlines() == [
        "LorakitError: rank 1 failed: OutputError: no room",
        "RuntimeError: rank 1 failed: ZeroDivisionError: no room",
        "cannot be sent",
        "[0, 10]",
    ], main.stderr
    alone = ["OutputError: no room", "ZeroDivisionError: no room", "another failed", "[0, 10]"]
    assert other.stdout.splitlines() == alone


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of one of two processes, to be changed."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_other_ways_to_train(name: str, init: pytest.MonkeyPatch) -> None:
    """What accelerate was once set up for, and lorakit does not use, is refused with what to type."""
    init.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match=rf"^accelerate is set up for {name}, .*--multi_gpu"):
        Distributed.init("auto")


def test_processes_and_gpus(init: pytest.MonkeyPatch) -> None:
    """More processes than GPUs, GPUs without NCCL, and one device for several processes are told all at once."""
    init.setattr(torch.cuda, "is_available", lambda: True)
    init.setattr(torch.cuda, "device_count", lambda: 1)
    init.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        Distributed.init("cuda:0")
    device, count, nccl = map(str, caught.value.problems)
    assert device.startswith("training.device: 'cuda:0' is one device")
    assert count == "2 processes were started on a machine with 1 GPU (start one process)"
    assert "on Windows none has" in nccl


def tasks_of(monkeypatch: pytest.MonkeyPatch, tasks: str, **others: str) -> None:
    """The environment of a process that srun started, and others' variables."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_PROCID": "0", **others}.items():
        monkeypatch.setenv(name, value)


def test_tasks_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks of srun that know nothing of each other are refused with the cure."""
    tasks_of(monkeypatch, "2")
    with pytest.raises(ConfigError, match=r"^srun started 2 tasks, .*torchrun.*--ntasks=1"):
        Distributed.init("cpu")


@pytest.mark.parametrize(("tasks", "others"), [("1", {}), ("2", {"WORLD_SIZE": "1"}), ("", {})])
def test_tasks_that_are_alone(monkeypatch: pytest.MonkeyPatch, tasks: str, others: dict[str, str]) -> None:
    """One task, and what a launcher has started, train as usual."""
    tasks_of(monkeypatch, tasks, **others)
    assert Distributed.init("cpu").world_size == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerate would start the devices of others")
def test_processes_that_find_no_other(init: pytest.MonkeyPatch) -> None:
    """Processes that were told how many they are, and not which, do not train each for itself."""
    program = "from lorakit.training.runtime.distributed import Distributed; Distributed.init('auto')"
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "ConfigError: WORLD_SIZE is 2, but this process finds no other" in result.stderr
