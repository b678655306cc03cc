"""Several runs in a row, as users start them: trained, compared, resumed, and going on after a failure."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from PIL import Image
from safetensors import safe_open

from lorakit.plugins.catalog import Catalog
from lorakit.series.runs import Planner, is_finished
from lorakit.training.report import config_hash

pytestmark = pytest.mark.usefixtures("lorakit_one_thread")


@pytest.fixture
def tables(tiny_sd1: Path, photographs: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of two steps with previews and validation."""
    prompts = ["a beach --w 64 --h 64 --s 1", "snow --w 64 --h 64 --s 1"]
    return {
        "model": {"path": str(tiny_sd1)},
        "data": {"image_dir": str(photographs), "resolution": 64, "validation_split": 0.25},
        "network": {"rank": 2, "alpha": 2.0},
        "training": {"max_steps": 2, "device": "cpu"},
        "output": {"dir": str(tmp_path / "out"), "name": "lora", "save_state": True, "save_every_n_steps": 1},
        "observers": [{"name": "samples", "prompts": prompts}, {"name": "validation"}],
    }


def write(folder: Path, tables: dict[str, Any], name: str = "config.toml") -> Path:
    """A config file."""
    path = folder / name
    path.write_text(tomlkit.dumps(tables))
    return path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `lorakit`."""
    command = [sys.executable, "-m", "lorakit", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def trained_rank(file: Path) -> str:
    """What a LoRA file says of its rank."""
    with safe_open(file, "pt") as opened:
        return str(opened.metadata()["ss_network_dim"])


def test_a_sweep(tables: dict[str, Any], tmp_path: Path) -> None:
    """Each combination is trained and named; the table, as CSV and Markdown too, and the sheet compare them."""
    write(tmp_path, tables)
    result = run(tmp_path, "sweep", "config.toml", "--vary", "network.rank=2,4", "--set", "network.alpha=4")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    assert [trained_rank(out / f"lora-rank{rank}.safetensors") for rank in (2, 4)] == ["2", "4"]
    with (out / "lora-sweep.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["run", "steps", "loss", "validation", "lowest", "time", "memory", "result"]
    reports = [json.loads((out / f"lora-rank{rank}.report.json").read_text()) for rank in (2, 4)]
    for row, report, rank in zip(rows, reports, (2, 4), strict=True):
        assert row[:4] == [f"rank={rank}", "2", f"{report['loss']:.4f}", f"{report['validation']:.4f}"]
        assert row[7] == f"out/lora-rank{rank}.safetensors"
        assert report["memory"] > 10**8
    assert (out / "lora-sweep.md").read_text().count("\n") == 4
    shown = [line.split() for line in result.stdout.splitlines()]
    assert ["RUN", "STEPS", "LOSS", "VALIDATION", "LOWEST", "TIME", "MEMORY", "RESULT"] in shown
    sheet = Image.open(out / "lora-sweep.png")
    assert sheet.size == (180 + 2 * 168 + 8, 32 + 2 * 168 + 8)
    again = run(tmp_path, "sweep", "config.toml", "--vary=network.rank=2,4", "--set=network.alpha=4", "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(finished)") == 2
    assert [json.loads((out / f"lora-rank{rank}.report.json").read_text()) for rank in (2, 4)] == reports


def test_others_are_trained_after_a_failure(tables: dict[str, Any], tmp_path: Path) -> None:
    """A run that fails is a row of the table, and the status is 1."""
    write(tmp_path, tables, "first.toml")
    # A loss that overflows at once.
    broken = {**tables, "optimizer": {"lr": 1e30}, "training": {**tables["training"], "max_steps": 5}}
    write(tmp_path, {**broken, "output": {**tables["output"], "name": "broken"}}, "second.toml")
    write(tmp_path, {**tables, "output": {**tables["output"], "name": "third"}}, "third.toml")
    result = run(tmp_path, "train", "first.toml", "second.toml", "third.toml", "--set", "observers=[]")
    assert result.returncode == 1, result.stderr
    with (tmp_path / "out" / "runs.csv").open() as file:
        _, *rows = csv.reader(file)
    assert [row[0] for row in rows] == ["first.toml", "second.toml", "third.toml"]
    assert [row[7].startswith("failed: ") for row in rows] == [False, True, False]
    assert (tmp_path / "out" / "third.safetensors").is_file()
    assert not (tmp_path / "out" / "runs.png").exists()


def test_problems_are_told_before_the_first_run(tables: dict[str, Any], tmp_path: Path) -> None:
    """All that is wrong with any run is listed, and nothing is trained."""
    write(tmp_path, tables)
    result = run(tmp_path, "sweep", "config.toml", "--vary", "network.rank=0,4", "--vary", "optimizer.lr=1e-4,x")
    assert result.returncode == 2
    assert result.stderr.count("network.rank: must be at least 1, not 0") == 2
    assert "lr=x: optimizer.lr: must be a number" in result.stderr
    assert not (tmp_path / "out").exists()
    for launcher, message in (
        ("nosuch -x", "there is no program 'nosuch'"),
        ("a 'b", "is no command line: no closing"),
    ):
        result = run(tmp_path, "sweep", "config.toml", "--vary", "network.rank=2,4", "--launcher", launcher)
        assert (result.returncode, result.stdout) == (2, "")
        assert message in " ".join(result.stderr.split())
    absent = run(tmp_path, "train", "config.toml", "absent.toml")
    assert absent.stderr == "error: absent.toml: cannot be read: No such file or directory\n"
    same = run(tmp_path, "train", "config.toml", "config.toml")
    assert same.returncode == 2
    assert "would write the same files, lora" in same.stderr


def test_a_series_is_stopped_and_resumed(tables: dict[str, Any], tmp_path: Path) -> None:
    """One Ctrl-C stops after the step; `--resume` goes on where it was, and does not repeat what was finished."""
    tables = {**tables, "observers": [], "training": {**tables["training"], "max_steps": 3}}
    write(tmp_path, tables)
    command = [sys.executable, "-m", "lorakit", "sweep", "config.toml", "--vary", "training.max_steps=3,60"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    second = tmp_path / "out" / "lora-max_steps60-step00000002.safetensors"
    for _ in range(600):
        if second.exists() or process.poll() is not None:
            break
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Stopped in the run max_steps=60" in errors
    reports = [tmp_path / "out" / f"lora-max_steps{steps}.report.json" for steps in (3, 60)]
    first, stopped = (json.loads(report.read_text()) for report in reports)
    assert stopped["error"].startswith("Stopped after step")
    result = run(tmp_path, *command[3:], "--resume")
    assert result.returncode == 0, result.stderr
    assert json.loads(reports[0].read_text()) == first
    after = json.loads(reports[1].read_text())
    assert (after["error"], after["steps"]) == ("", 60)
    assert f"step {stopped['steps'] + 1}/60" in result.stderr or "resum" in result.stderr.lower()


def test_a_signal_before_a_run_listens(tables: dict[str, Any], tmp_path: Path) -> None:
    """A run that SIGTERM ends while it starts is stopped like any other: it has not failed, and no other begins."""
    write(tmp_path, tables)
    starting = f"{sys.executable} -c 'import time; print(\"starting\", flush=True); time.sleep(60)'"
    command = ["sweep", "config.toml", "--vary", "network.rank=2,4", "--launcher", starting]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", *command], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert any("starting" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Stopped in the run rank=2" in errors
    assert "starting" not in output
    assert not (tmp_path / "out" / "lora-sweep.csv").exists()


def test_what_is_finished(tables: dict[str, Any], tmp_path: Path) -> None:
    """A run counts as finished if its report is whole and of the same config, and its file is there."""
    path, catalog = write(tmp_path, tables), Catalog.discover()
    planned = Planner(catalog, resuming=True).plan("one", path, [])
    assert not is_finished(planned)
    file = tmp_path / "out" / "lora.safetensors"
    file.parent.mkdir()
    whole = {"config": config_hash(planned.config), "steps": 2, "error": "", "file": str(file)}
    cases: list[tuple[dict[str, Any], bool]] = [
        (whole, True), ({**whole, "steps": 1}, False), ({**whole, "error": "out of memory"}, False),
    ]  # fmt: skip
    file.touch()
    for report, finished in cases:
        planned.report.write_text(json.dumps(report))
        assert is_finished(planned) == finished
    planned.report.write_text(json.dumps(whole))
    assert not is_finished(Planner(catalog, resuming=True).plan("two", path, ["network.rank=8"]))
    planned.report.write_text("{")
    assert not is_finished(planned)
    planned.report.write_text(json.dumps(whole))
    file.unlink()
    assert not is_finished(planned)


def test_images_are_looked_at_once_for_all_runs(tables: dict[str, Any], tmp_path: Path) -> None:
    """What the plan of one run knows of the images, those of the others take over, and nothing is written."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64), "teal").save(photos / f"{name}.png")
    tables["data"]["image_dir"] = str(photos)
    path, planner = write(tmp_path, tables), Planner(Catalog.discover())
    planner.plan("one", path, [])
    for image in photos.iterdir():  # not readable again, and of the same length and time
        status = image.stat()
        image.write_bytes(b"x" * status.st_size)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert planner.plan("two", path, ["network.rank=4"]).total_steps == 2
    assert not (tmp_path / "out").exists()
