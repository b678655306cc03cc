"""Runs that are killed at any moment and resumed end with the bytes of the run that was left alone."""

from __future__ import annotations

import signal
from pathlib import Path
from random import Random

import pytest

from tests.faults.conftest import KILLS
from tests.faults.runs import Reference, SmallRun, weights_of
from tests.faults.scenarios import PROMPTS, SCENARIOS

PLAIN_KILLS = max(1, KILLS // 10)
FORKED_KILLS = -(-(KILLS - PLAIN_KILLS) // len(SCENARIOS))


def scenario_run(name: str, run: SmallRun) -> SmallRun:
    """A run of a scenario."""
    changed = run.beside("whole", **{key: value for key, value in SCENARIOS[name].items() if key != "observers"})
    changed.folder.mkdir()
    (changed.folder.parent / "prompts.txt").write_text(PROMPTS)
    observers = [
        {**own, **({"prompts": str(changed.folder.parent / "prompts.txt")} if "prompts" in own else {})}
        for own in SCENARIOS[name].get("observers", [])
    ]
    return SmallRun(changed.folder, {**changed.tables, "observers": observers} if observers else changed.tables)


def kill_and_resume(run: SmallRun, reference: Reference, kills: int, random: Random) -> None:
    """Kill a run so many times at random moments, start-ups included, resume it each time, and compare its end.

    A run that ends before its kill is compared, and another one begun.
    """
    lives = 0
    while kills:
        life = run.beside(f"life-{lives}")
        lives += 1
        while kills:
            attempt = life.start(*_workers(random))
            moment = random.uniform(0, reference.startup)
            if random.random() < 0.8:
                moment = reference.startup + random.uniform(0, (reference.total - reference.startup) / 2)
            killed = attempt.until(lambda: attempt.cpu_seconds >= moment)  # noqa: B023 - called at once
            attempt.send(signal.SIGKILL)
            if attempt.wait() == 0:
                break
            assert killed
            assert attempt.poll() == -signal.SIGKILL, attempt.said
            assert "Traceback" not in attempt.said
            life.check_files()
            kills -= 1
        life.finish(*_workers(random))
        assert weights_of(life.final) == reference.weights


def _workers(random: Random) -> tuple[str]:
    return (f"data.workers={random.choice((1, 2, 3))}",)


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_random_moments(name: str, run: SmallRun) -> None:
    """Whatever is trained and however, SIGKILL costs nothing: the weights are those of the uninterrupted run."""
    whole = scenario_run(name, run)
    kill_and_resume(whole, Reference.of(whole), FORKED_KILLS, Random(f"{name} {KILLS}"))


def test_plain_command_killed_at_random_moments(run: SmallRun) -> None:
    """The same for `python -m lorakit` from its start on, imports included."""
    whole = SmallRun(run.folder.parent / "whole", run.tables, plain=True)
    kill_and_resume(whole, Reference.of(whole), PLAIN_KILLS, Random(f"plain {KILLS}"))
