"""Disks that are full, fail, are slow or vanish: a message, nothing broken, nothing lost, and an exact end later."""

from __future__ import annotations

import signal
from errno import EDQUOT, EIO, ENOSPC, EROFS
from pathlib import Path

import pytest

from tests.faults.commands import Attempt, SmallDisk
from tests.faults.conftest import some
from tests.faults.injection import Fault
from tests.faults.runs import Reference, SmallRun, check_folder, weights_of


def is_told(attempt: Attempt) -> bool:
    """Whether a run that could not write ended with one message, and no traceback."""
    errors = [line for line in attempt.said.splitlines() if line.startswith("error: ")]
    return len(errors) == 1 and "Traceback" not in attempt.said and "internal error" not in attempt.said


def save_operations(reference: Reference) -> range:
    """The numbers of the operations of the second save, which takes the place of the first one's state.

    Each save writes its adapters first, so it begins with the first operation on them.
    """
    numbers = [index for index, own in enumerate(output_operations(reference)) if "step00000004.safetensors" in own]
    following = [index for index, own in enumerate(output_operations(reference)) if "step00000006.safetensors" in own]
    return range(numbers[0], following[0])


def output_operations(reference: Reference) -> list[str]:
    """All operations of a run on files in its output folder."""
    return [own for own in reference.operations if "/run/out" in own]


@pytest.mark.parametrize("share", some([index / 24 for index in range(24)], 4))
def test_killed_before_an_operation_of_a_save(share: float, run: SmallRun, reference: Reference) -> None:
    """SIGKILL before any single operation on files of a save, and of the removal of the state before, costs nothing."""
    operations = save_operations(reference)
    first = operations[int(share * len(operations))]
    attempt = run.start(faults=[Fault(part="/run/out", do="kill", first=first)])
    assert attempt.wait() == -signal.SIGKILL, attempt.said
    run.check_files()
    assert run.states()
    run.finish()
    assert weights_of(run.final) == reference.weights


def test_killed_while_an_old_state_is_removed(run: SmallRun, reference: Reference) -> None:
    """SIGKILL when the first file of an old state is gone leaves no half of it under its name."""
    attempt = run.start(faults=[Fault(part="step00000002/", do="kill", operations=("remove",), first=1)])
    assert attempt.wait() == -signal.SIGKILL, attempt.said
    run.check_files()
    run.finish()
    assert weights_of(run.final) == reference.weights


WRITES = [(part, size) for part in ("step00000004.safetensors", "-state/") for size in (0, 4096, 100_001)]


@pytest.mark.parametrize(("part", "size"), some(WRITES, 2))
def test_killed_in_a_write(part: str, size: int, run: SmallRun, reference: Reference) -> None:
    """A process that the system ends in the middle of a write, at this byte of a file, leaves no half of it."""
    first = sum(part in own for own in output_operations(reference)[: save_operations(reference)[0]])
    attempt = run.start(faults=[Fault(part=part, do="tear", first=first, bytes=size)])
    assert attempt.wait() == -signal.SIGXFSZ, attempt.said
    run.check_files()
    assert run.states()
    run.finish()
    assert weights_of(run.final) == reference.weights


REFUSALS = [
    (operations, errno)
    for errno in (EIO, ENOSPC, EROFS, EDQUOT)
    for operations in (("fsync",), ("open", "mkdir"), ("rename",))
]


@pytest.mark.parametrize(("operations", "errno"), some(REFUSALS, 3))
def test_refused_to_the_end(operations: tuple[str, ...], errno: int, run: SmallRun, reference: Reference) -> None:
    """Where the output folder takes nothing any more, one message says so, what was there stays; a resume is exact."""
    first = sum(own.split()[0] in operations for own in output_operations(reference)[: save_operations(reference)[0]])
    fault = Fault(part="/run/out", do="refuse", first=first, operations=operations, errno=errno)
    attempt = run.start(faults=[fault])
    assert attempt.wait() in (1, 2), attempt.said
    assert is_told(attempt), attempt.said
    run.check_files()
    assert (run.output / "test-step00000002.safetensors").exists()
    assert run.states()
    run.finish()
    assert weights_of(run.final) == reference.weights


@pytest.mark.parametrize("operations", some([("fsync",), ("open", "mkdir"), ("rename",)], 1))
def test_refused_for_a_while(operations: tuple[str, ...], run: SmallRun, reference: Reference) -> None:
    """A save that fails is told of, the next one tries again, and the run ends as if nothing had been."""
    first = sum(own.split()[0] in operations for own in output_operations(reference)[: save_operations(reference)[0]])
    fault = Fault(part="/run/out", do="refuse", first=first, count=2, operations=operations)
    attempt = run.finish(faults=[fault])
    assert "cannot be written: Input/output error" in attempt.said
    assert (run.output / "test-step00000006.safetensors").exists()
    assert [state.name for state in run.states()] == ["step00000008"]
    assert weights_of(run.final) == reference.weights


def test_no_room_for_a_while(run: SmallRun, reference: Reference) -> None:
    """No file can grow, whatever library writes it, from the second save to the third; then all is well."""
    first, operations = save_operations(reference)[0], len(save_operations(reference))
    attempt = run.finish(faults=[Fault(part="/run/out", do="fill", first=first, count=operations // 2, bytes=50_000)])
    assert "cannot be written: File too large" in attempt.said
    assert [state.name for state in run.states()] == ["step00000008"]
    assert weights_of(run.final) == reference.weights


def test_no_room_from_the_start(run: SmallRun, reference: Reference) -> None:
    """Where not even the config can be written, it is said, and the next run is exact."""
    attempt = run.start(faults=[Fault(part="/run/out", do="fill", bytes=1500)])
    assert attempt.wait() in (1, 2), attempt.said
    assert is_told(attempt), attempt.said
    run.check_files()
    assert not run.states()
    run.finish()
    assert weights_of(run.final) == reference.weights


@pytest.mark.parametrize("size", some([1.3e6, 0.5e6], 1))
def test_small_disk(size: float, run: SmallRun, reference: Reference, tmp_path: Path) -> None:
    """A real disk that fills up: what fits is whole, one message tells of the rest, and a resume elsewhere is exact."""
    attempt = run.start(disk=SmallDisk(run.output, int(size), tmp_path / "copy"))
    status = attempt.wait()
    if "no mount namespace" in attempt.said or "no disk in memory" in attempt.said:
        pytest.skip("this system mounts no disk for a test")
    assert status in (1, 2), attempt.said
    assert is_told(attempt), attempt.said
    assert "No space left on device" in attempt.said
    run.output.rmdir()
    (tmp_path / "copy").rename(run.output)
    run.check_files()
    run.finish()
    assert weights_of(run.final) == reference.weights


def test_slow_disk(run: SmallRun, reference: Reference) -> None:
    """A disk that takes long to flush makes a run slower, and no other."""
    run.finish(faults=[Fault(part="/run/out", do="wait", operations=("fsync",), seconds=0.05)])
    assert weights_of(run.final) == reference.weights


def test_folder_that_vanishes(run: SmallRun, reference: Reference) -> None:
    """An output folder that is moved away is made anew, or that is told; the old one's files are whole."""
    away = run.folder / "away"
    attempt = run.start(faults=[Fault(part="step00000004.safetensors", do="wait", count=1, seconds=1.0)])
    assert attempt.until(lambda: attempt.operations.exists() and "step00000004" in attempt.operations.read_text())
    run.output.rename(away)
    assert attempt.wait() == 0 or is_told(attempt), attempt.said
    check_folder(away)
    run.finish()
    assert weights_of(run.final) == reference.weights


@pytest.mark.parametrize("operation", some(["open", "fsync", "rename"], 1))
def test_cache_that_is_refused(operation: str, run: SmallRun, reference: Reference, tmp_path: Path) -> None:
    """A cache that cannot be written is told of, holds nothing broken, and the next run is exact."""
    cold = run.beside("cold", data={"cache_dir": str(tmp_path / "cold-cache")})
    attempt = cold.start(
        faults=[Fault(part="/cold-cache", do="refuse", first=3, operations=(operation,), errno=ENOSPC)]
    )
    assert attempt.wait() == 0 or is_told(attempt), attempt.said
    assert "cold-cache" in attempt.said
    assert "No space left on device" in attempt.said
    cold.check_files()
    cold.finish()
    assert weights_of(cold.final) == reference.weights


@pytest.mark.parametrize("number", some(range(0, 24, 2), 1))
def test_killed_while_the_cache_is_filled(number: int, run: SmallRun, reference: Reference, tmp_path: Path) -> None:
    """SIGKILL before an operation on the cache leaves no broken entry in it, and the next run is exact."""
    cold = run.beside("cold", data={"cache_dir": str(tmp_path / "cold-cache")})
    attempt = cold.start(faults=[Fault(part="/cold-cache", do="kill", first=number)])
    assert attempt.wait() == -signal.SIGKILL, attempt.said
    cold.check_files()
    cold.finish()
    assert weights_of(cold.final) == reference.weights
