"""Runs that are killed at any moment and resumed end with the bytes of the run that was left alone."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from lorakit.utils.rng import keyed_generator
from tests.faults.conftest import KILLS
from tests.faults.runs import Reference, SmallRun, weights_of
from tests.faults.scenarios import PROMPTS, SCENARIOS

PLAIN_KILLS = max(1, KILLS // 10)
SHARES = [(KILLS - PLAIN_KILLS + index) // len(SCENARIOS) for index in range(len(SCENARIOS))]
"""How often runs of each scenario are killed, `KILLS` times in all with those of the plain command."""


def scenario_run(name: str, run: SmallRun) -> SmallRun:
    """A run of a scenario."""
    changed = run.beside("whole", **{key: value for key, value in SCENARIOS[name].items() if key != "observers"})
    changed.folder.mkdir()
    (changed.folder.parent / "prompts.txt").write_text(PROMPTS)
    observers = [
        {**own, "prompts": str(changed.folder.parent / "prompts.txt")} if own["name"] == "samples" else own
        for own in SCENARIOS[name].get("observers", [])
    ]
    return SmallRun(changed.folder, {**changed.tables, "observers": observers})


def kill_and_resume(run: SmallRun, reference: Reference, kills: int, random: np.random.Generator) -> None:
    """Kill a run so many times at random moments, start-ups included, resume it each time, and compare its end.

    A run that ends before its kill is compared, and another one begun.
    """
    lives = 0
    while kills:
        life = run.beside(f"life-{lives}")
        lives += 1
        while kills and _killed(life, reference, random):
            kills -= 1
        life.finish(_workers(random))
        assert weights_of(life.final) == reference.weights


def _killed(run: SmallRun, reference: Reference, random: np.random.Generator) -> bool:
    """Go on with a run until it is killed at a random moment, and look at its files; False where it ended before."""
    attempt, moment = run.start(_workers(random)), random.uniform(0, reference.startup)
    if random.random() < 0.8:
        attempt.until(lambda: attempt.has_saved)
        moment = attempt.cpu_seconds + random.uniform(0, reference.rest / 2)
    attempt.until(lambda: attempt.cpu_seconds >= moment)
    attempt.send(signal.SIGKILL)
    if attempt.wait() == 0:
        return False
    assert attempt.poll() == -signal.SIGKILL, attempt.said
    assert "Traceback" not in attempt.said
    run.check_files()
    return True


def _workers(random: np.random.Generator) -> str:
    return f"data.workers={random.integers(1, 4)}"


@pytest.mark.parametrize(("name", "kills"), zip(SCENARIOS, SHARES, strict=True), ids=SCENARIOS)
def test_killed_at_random_moments(name: str, kills: int, run: SmallRun) -> None:
    """Whatever is trained and however, SIGKILL costs nothing: the weights are those of the uninterrupted run."""
    whole = scenario_run(name, run)
    kill_and_resume(whole, Reference.of(whole), kills, keyed_generator("kills", name))


def test_plain_command_killed_at_random_moments(run: SmallRun) -> None:
    """The same for `python -m lorakit` from its start on, imports included."""
    whole = SmallRun(run.folder.parent / "whole", run.tables, plain=True)
    kill_and_resume(whole, Reference.of(whole), PLAIN_KILLS, keyed_generator("plain kills"))
