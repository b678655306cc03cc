"""The suites notice what is wrong: each broken component fails exactly the tests that it breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.contracts import broken_components

UNREGISTERED = {"test_registered", "test_reads_back_from_a_config_file"}
"""What all of them fail, because no entry point leads to them."""

SUITES = {name: suite for name, suite in vars(broken_components).items() if name.startswith("Test")}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The tests that fail, by suite."""
    report = tmp_path_factory.mktemp("broken") / "report.xml"
    # All stand in one file that imports torch, which takes seconds: one of them shows that this is noticed.
    selected = "not test_imports_nothing_heavy or TestUndecorated"
    options = ["-p", "no:cacheprovider", f"--junit-xml={report}", "-q", "--tb=no", "-k", selected]
    command = [sys.executable, "-m", "pytest", broken_components.__file__, *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 1, run.stdout[-2000:] + run.stderr[-2000:]
    found: dict[str, set[str]] = {name: set() for name in SUITES}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            found[case.attrib["classname"].rpartition(".")[2]].add(case.attrib["name"])
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_notices_what_is_broken(suite: str, failures: dict[str, set[str]]) -> None:
    """A suite's failures are those that its component's faults explain, no less and no more."""
    assert failures[suite] == UNREGISTERED | set(SUITES[suite].violates)
