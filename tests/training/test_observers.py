"""How observers are told: in what order, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lorakit
from lorakit.api.observer import Observer, RunInfo
from lorakit.errors import ConfigError, OutputError, TrainingDiverged
from lorakit.training.observers import Observers
from lorakit.training.prepare import prepare
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run


class Scripted(Observer):
    """Notes what it is told, and then does what the test wants."""

    def __init__(self, **acts: Callable[[], None]) -> None:
        self.acts = acts
        self.told: list[str] = []

    def run_started(self, run: RunInfo) -> None:  # noqa: ARG002
        """Noted."""
        self._note("run_started")

    def step_finished(self, step: int) -> None:  # noqa: ARG002
        """Noted."""
        self._note("step_finished")

    def validated(self, step, losses) -> None:  # noqa: ARG002
        """Noted."""
        self._note("validated")

    def closed(self) -> None:
        """Noted."""
        self._note("closed")

    def _note(self, event: str) -> None:
        self.told.append(event)
        self.acts.get(event, lambda: None)()


def fail() -> None:
    """What a broken observer does."""
    raise ValueError("broken")


def watching(*observers: Scripted) -> Observers:
    """These observers, without which a run can do."""
    return Observers((f"number {index}", False, observer) for index, observer in enumerate(observers))


@pytest.fixture
def info(make_config) -> RunInfo:
    """A run before its first step."""
    return RunHandle(build_run(prepare(make_config()), Distributed(torch.device("cpu"))))


def test_copies_in_layouts_without_names(make_config) -> None:
    """A layout that the family has no names for is refused when the config is read; that of the files is a warning."""
    with pytest.raises(ConfigError, match=r"observers\[0\]\.layouts: has 'original', in .* sd1 have no names"):
        make_config(observers=[{"name": "diffusers", "layouts": ["original"]}])
    config = make_config(observers=[{"name": "diffusers", "layouts": ["kohya"]}])
    assert [warning.key for warning in config.warnings()] == ["observers[0].layouts"]


def test_nobody_hears_of_anything_before_the_start(info: RunInfo) -> None:
    """What one observer tells while the run starts reaches those that start after it when they have started."""
    first, second = Scripted(run_started=lambda: observers.notify("validated", 0, {})), Scripted()
    observers = watching(first, second)
    observers.start(info)
    assert first.told == second.told == ["run_started", "validated"]


def test_previews_before_the_first_step_are_in_the_log(make_config, tmp_path) -> None:
    """A log that stands behind the previews in the config shows the first ones, too."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    previews = {"name": "samples", "prompts": str(prompts), "at_first": True}
    log = {"name": "tensorboard", "dir": str(tmp_path / "logs")}
    lorakit.train(make_config(training={"max_steps": 1}, observers=[previews, log]))
    events = EventAccumulator(str(next((tmp_path / "logs").iterdir())))
    events.Reload()
    assert [image.step for image in events.Images("previews/00")] == [0, 1]
    assert [event.step for event in events.Scalars("loss")] == [1]


def test_an_observer_that_fails_twice(caplog: pytest.LogCaptureFixture) -> None:
    """One that is detached while another tells it something hears no more of what is being told, and fails but once."""
    fails = Scripted(validated=fail, step_finished=fail)
    observers = watching(Scripted(step_finished=lambda: observers.notify("validated", 1, {})), fails)
    observers.notify("step_finished", 1)
    assert fails.told == ["validated"]
    fails_itself = Scripted(step_finished=lambda: (observers.notify("validated", 1, {}), fail()), validated=fail)
    observers = watching(fails_itself)
    observers.notify("step_finished", 1)
    assert fails_itself.told == ["step_finished", "validated"]
    assert caplog.text.count("is detached") == 2


def test_all_are_closed() -> None:
    """At the end all are told, those that were detached too, whichever of them fails at that."""
    observers = [Scripted(closed=fail), Scripted(step_finished=fail), Scripted(closed=fail), Scripted()]
    told = Observers((str(index), index == 0, observer) for index, observer in enumerate(observers))
    told.notify("step_finished", 1)
    with pytest.raises(ValueError, match="broken"):
        told.close()
    assert [observer.told[-1] for observer in observers] == ["closed"] * 4


def refuse() -> None:
    """What an observer does that cannot write its file."""
    raise OutputError("the disk is full")


def test_a_file_that_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    """Hours of training do not end because a log cannot be written; they do if the run needs the observer."""
    watching(Scripted(step_finished=refuse)).notify("step_finished", 1)
    assert "the disk is full" in caplog.text
    with pytest.raises(OutputError):
        Observers([("saves", True, Scripted(step_finished=refuse))]).notify("step_finished", 1)


def diverge() -> None:
    """What a save does when the weights are not finite."""
    raise TrainingDiverged("not finite")


def test_divergence_ends_the_run() -> None:
    """That training has failed is not the fault of the observer that comes upon it."""
    with pytest.raises(TrainingDiverged):
        watching(Scripted(step_finished=diverge)).notify("step_finished", 1)


def test_who_tells_of_an_unknown_event_is_to_blame() -> None:
    """An observer that tells of an event that there is not is detached, and no other."""
    fails, other = Scripted(step_finished=lambda: observers.notify("validatd", 1)), Scripted()
    observers = watching(other, fails)
    for step in (1, 2):
        observers.notify("step_finished", step)
    assert other.told == ["step_finished", "step_finished"]
    assert fails.told == ["step_finished"]
