"""The suites notice what is wrong: each broken component fails exactly the tests that it breaks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contracts.broken import models, parts

UNREGISTERED = {"test_registered", "test_reads_back_from_a_config_file"}
"""What all of them fail, because no entry point leads to them."""

SUITES = {name: suite for module in (parts, models) for name, suite in vars(module).items() if name.startswith("Test")}


@pytest.fixture(scope="module")
def failures() -> dict[str, set[str]]:
    """The tests that fail, by suite."""
    # All are in files that import torch, which takes seconds: one of them proves that this is noticed.
    selected = "not test_imports_nothing_heavy or TestUntidy"
    options = ["-p", "no:cacheprovider", "--tb=no", "-q", "-rfE", "-k", selected]
    command = [sys.executable, "-m", "pytest", parts.__file__, models.__file__, *options]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 1, run.stdout[-2000:] + run.stderr[-2000:]
    found: dict[str, set[str]] = {name: set() for name in SUITES}
    for suite, test in re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)::(\S+)", run.stdout, flags=re.MULTILINE):
        found[suite].add(test)
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_notices_what_is_broken(suite: str, failures: dict[str, set[str]]) -> None:
    """A suite's failures are those that its component's faults explain, no less and no more."""
    unregistered = {test for test in UNREGISTERED if getattr(SUITES[suite], test)}
    assert failures[suite] == unregistered | set(SUITES[suite].violates)
