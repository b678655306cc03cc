"""Two runs at the same time, in one output folder or with one cache."""

from __future__ import annotations

import signal
from pathlib import Path

from lorakit.utils.rng import keyed_generator
from tests.faults.runs import Reference, SmallRun, weights_of


def test_one_cache_while_a_run_is_killed(run: SmallRun, reference: Reference, tmp_path: Path) -> None:
    """Of three runs that fill one empty cache two are killed on the way; the third ends as if alone."""
    cache, random = {"cache_dir": str(tmp_path / "cold-cache")}, keyed_generator("one cache")
    runs = [run.beside(f"run-{number}", data=cache) for number in range(3)]
    attempts = [own.start() for own in runs]
    for attempt in attempts[1:]:
        seconds = random.uniform(0.8, 1.2) * reference.startup
        attempt.until(lambda: attempt.cpu_seconds >= seconds)  # noqa: B023 - called at once
        attempt.send(signal.SIGKILL)
        attempt.wait()
    assert attempts[0].wait() == 0, attempts[0].said
    for own in runs:
        own.finish()
        assert weights_of(own.final) == reference.weights


def both_in_one_folder(run: SmallRun) -> tuple[list[int | None], str]:
    """Two runs of the same name in the same folder at the same time: their exit statuses, and what they said."""
    attempts = [run.start(resume=False), run.start(resume=False)]
    for attempt in attempts:
        assert attempt.wait() in (0, 2), attempt.said
        assert "Traceback" not in attempt.said
        assert "internal error" not in attempt.said
    run.check_files()
    return [attempt.poll() for attempt in attempts], attempts[0].said


def test_one_output_folder(run: SmallRun, reference: Reference) -> None:
    """Two runs of one name in one folder leave no broken file, and at the end the weights of one of them."""
    statuses, _ = both_in_one_folder(run)
    assert 0 in statuses
    assert weights_of(run.final) == reference.weights


def test_second_run_in_an_output_folder_is_told(run: SmallRun, reference: Reference) -> None:
    """The second of two runs of one name in one folder is refused with a message that names the folder."""
    statuses, said = both_in_one_folder(run)
    assert sorted(map(str, statuses)) == ["0", "2"]
    assert f"another run is writing 'test' to {run.output.name}: " in said
    assert weights_of(run.final) == reference.weights
