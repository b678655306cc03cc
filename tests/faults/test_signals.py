"""Runs that are asked to stop, at any moment, save a state, say how to go on, and end the same when resumed."""

from __future__ import annotations

import signal

import pytest

from lorakit.utils.rng import keyed_generator
from tests.faults.conftest import KILLS
from tests.faults.injection import Fault
from tests.faults.runs import Reference, SmallRun, weights_of


@pytest.mark.parametrize("number", range(max(2, KILLS // 5)))
def test_stopped_at_a_random_moment(number: int, run: SmallRun, reference: Reference) -> None:
    """The first SIGTERM or Ctrl-C ends with 130 and a state, after no more than the step; the resumed run is exact."""
    attempt = run.start()
    attempt.until(lambda: attempt.has_saved)
    moment = attempt.cpu_seconds + keyed_generator("stop", number).uniform(0, reference.rest)
    attempt.until(lambda: attempt.cpu_seconds >= moment)
    attempt.send(signal.SIGINT if number % 2 else signal.SIGTERM)
    status = attempt.wait()
    if run.final.exists():  # the last step was done
        assert status in (0, 130), attempt.said
    else:
        assert status == 130, attempt.said
        assert "--resume" in attempt.said
        assert run.states()
    assert "Traceback" not in attempt.said
    run.check_files()
    run.finish()
    assert weights_of(run.final) == reference.weights


def test_second_signal_stops_at_once(run: SmallRun, reference: Reference) -> None:
    """A second signal, in the middle of a slow save, kills the run with no state of it; what was there is whole."""
    slow = Fault(part="step00000004.safetensors", do="wait", operations=("fsync", "open"), seconds=2.0)
    attempt = run.start(faults=[slow])
    saving = attempt.until(lambda: attempt.operations.exists() and "step00000004" in attempt.operations.read_text())
    assert saving
    attempt.send(signal.SIGINT)
    assert attempt.until(lambda: "once more stops at once" in attempt.said)
    attempt.send(signal.SIGINT)
    assert attempt.wait() == -signal.SIGINT, attempt.said
    assert "Traceback" not in attempt.said
    run.check_files()
    assert [state.name for state in run.states()] == ["step00000002"]
    run.finish()
    assert weights_of(run.final) == reference.weights


@pytest.mark.parametrize("renaming", [1, 2])
def test_killed_while_a_state_is_replaced(renaming: int, run: SmallRun, reference: Reference) -> None:
    """A stop right after a save saves that step's state again; SIGKILL before a renaming leaves one of the two."""
    slow = Fault(part="step00000004.safetensors", do="wait", operations=("fsync",), seconds=0.5)
    kill = Fault(part="test-state/step00000004", do="kill", operations=("rename",), first=renaming)
    attempt = run.start(faults=[slow, kill])
    assert attempt.until(lambda: attempt.operations.exists() and "step00000004" in attempt.operations.read_text())
    attempt.send(signal.SIGTERM)
    assert attempt.wait() in (-signal.SIGKILL, 130), attempt.said
    run.check_files()
    assert run.states()
    run.finish()
    assert weights_of(run.final) == reference.weights
