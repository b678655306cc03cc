"""CPU processes that accelerate is asked for and does not start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorakit.training.runtime.cpu_launch import num_processes

REPORT = (
    "import logging, os; logging.basicConfig(); from lorakit.training.runtime.cpu_launch import join_cpu_processes; "
    "join_cpu_processes(); print(os.environ.get('WORLD_SIZE'), os.environ.get('RANK'))"
)


@pytest.mark.parametrize(
    ("command", "count"),
    [
        (["accelerate", "launch", "--cpu", "--num_processes", "4", "-m", "lorakit"], 4),
        (["accelerate", "launch", "--num_processes=3", "-m", "lorakit"], 3),
        (["accelerate", "launch", "--num-processes", "2", "-m", "lorakit"], 2),
        (["accelerate", "launch", "-m", "lorakit", "train", "config.toml"], None),
        (["accelerate", "launch", "--num_processes"], None),
    ],
)
def test_count_is_read_from_the_command(command: list[str], count: int | None) -> None:
    """Both spellings of accelerate's option are understood; without it there is no count."""
    assert num_processes(command) == count


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({}, False),
        ({"ACCELERATE_USE_CPU": "True"}, False),
        ({"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1"}, False),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, True),
    ],
)
def test_only_a_lone_process_is_joined(environment: dict[str, str], warned: bool) -> None:
    """Nothing changes for a single process or one of several; where the count is unknown, the user is told."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "MASTER_ADDR")}
    result = subprocess.run(
        [sys.executable, "-c", REPORT], env=inherited | environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [str(environment.get("WORLD_SIZE")), str(environment.get("RANK"))]
    assert ("--num_processes" in result.stderr) == warned
