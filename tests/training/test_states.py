"""Which states and saves a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from safetensors.torch import load_file

import lorakit
from lorakit.errors import ConfigError, OutputError
from lorakit.networks.adapter_file import AdapterFile, SafetensorsSaver
from lorakit.plugins.catalog import Catalog
from lorakit.training.checkpoint.state import find_state, forget_end, read_state
from lorakit.training.prepare import prepare
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import add_observers, build_run, run_training
from tests.training.conftest import MakeConfig
from tests.training.test_compatibility import identity, state_at


def names(folder: Path, pattern: str) -> list[str]:
    """The names of what is in a folder, sorted."""
    return sorted(path.name for path in folder.glob(pattern))


@pytest.mark.parametrize(
    ("output", "steps"),
    [
        ({"save_state": True}, [6]),
        ({"save_state": True, "keep_last_states": 2}, [4, 6]),
        ({"save_state": True, "keep_last_states": 9}, [2, 4, 6]),
        ({"save_state_at_end": True}, [6]),
        ({}, []),
    ],
)
def test_states_that_stay(output: dict[str, Any], steps: list[int], make_config: MakeConfig) -> None:
    """The newest states stay, one where nothing is said; `save_state_at_end` saves none before."""
    config = make_config(output={"save_every_n_steps": 2, **output})
    lorakit.train(config)
    assert names(config.output.dir / "test-state", "*") == [f"step{step:08d}" for step in steps]


def test_a_run_anew_beside_later_states(make_config: MakeConfig) -> None:
    """A run that starts anew where another had come further keeps its states and the other's; each resumes its own."""
    config, other = make_config(), make_config(optimizer={"lr": 2e-3})
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    later = state_at(run, 500)
    run.fingerprint = identity(other)
    first, second = state_at(run, 3), state_at(run, 4)
    assert [state.exists() for state in (later, first, second)] == [True, False, True]
    assert find_state(identity(config), None) == later
    assert find_state(identity(other), None) == second


def test_resumed_with_what_does_not_count_changed(make_config: MakeConfig) -> None:
    """A run that goes on recomputing activations, with another attention and observers, ends as if unchanged.

    But for rounding, of which another attention makes a little. Images are large enough for two positions in the
    mid block: attention over one passes no gradient to its queries and keys, and AdamW would make steps of what
    rounding leaves of zero.
    """
    sections = {"network": {"dropout": 0.1}, "data": {"validation_split": 0.25, "resolution": 128}}
    whole = lorakit.train(make_config(**sections, output={"name": "whole"}))
    lorakit.train(make_config(**sections, training={"max_steps": 3}, output={"save_state_at_end": True}))
    changed = make_config(
        **sections,
        attention={"name": "eager"},
        training={"gradient_checkpointing": True},
        observers=[{"name": "validation", "every_n_steps": 1}],
    )
    resumed = lorakit.train(changed, resume=changed.output.dir / "test-state" / "step00000003")
    ours, theirs = load_file(resumed), load_file(whole)
    for key, tensor in theirs.items():
        assert (ours[key] - tensor).norm() <= 1e-2 * tensor.norm()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": 3}'])
def test_state_whose_description_is_damaged(content: str, make_config: MakeConfig) -> None:
    """A description that cannot be read is a message that names the state, whether it is asked for or the newest."""
    config = make_config()
    state = state_at(build_run(prepare(config), Distributed(torch.device("cpu"))), 3)
    (state / "state.json").write_text(content)
    for asked in (state, None):
        with pytest.raises(ConfigError, match=r"step00000003 is damaged"):
            find_state(identity(config), asked)


@pytest.mark.parametrize("name", ["network.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("whole", [False, True])
def test_damaged_states_are_passed_over(
    name: str, whole: bool, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the newest state is cut short or changed, the one before it is taken, and that is said."""
    config = make_config(output={"save_state": True, "keep_last_states": 2})
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    older, newest = state_at(run, 3), state_at(run, 4)
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content if whole and name != "state.json" else content[: len(content) // 2])
    assert find_state(identity(config), None) == older
    assert f"skipping a newer state: --resume: the state in {newest} is damaged" in caplog.text
    with pytest.raises(ConfigError, match="step00000004 is damaged"):
        find_state(identity(config), newest)


class Secretive(torch.optim.SGD):
    """Has a state that only code could bring back."""

    def state_dict(self) -> dict[str, Any]:
        """With a folder in it."""
        return {**super().state_dict(), "where": Path()}


def test_a_state_that_could_not_be_read_is_not_kept(make_config: MakeConfig) -> None:
    """Where an optimizer keeps what has no form in a file, nothing is left of the state and older ones stay."""
    config = make_config()
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    older = state_at(run, 3)
    run.optimizer = Secretive(run.network.parameters_of("unet"), lr=1.0)
    with pytest.raises(OutputError, match=r"step00000004 was not written: .*Path has no place in a state"):
        state_at(run, 4)
    assert list(older.parent.iterdir()) == [older]


@frozen
class LossySaver(SafetensorsSaver):
    """Loses a number of what it is given."""

    def save(self, adapter: AdapterFile, path: Path) -> None:
        """Write all, but for one number."""
        key = max(adapter.tensors)
        super().save(AdapterFile({**adapter.tensors, key: adapter.tensors[key] + 1}), path)


def test_a_file_that_is_read_back_otherwise_is_not_kept(make_config: MakeConfig) -> None:
    """A LoRA file is compared with what it should hold before it takes the place of an older one."""
    run = build_run(prepare(make_config()), Distributed(torch.device("cpu")))
    before = RunHandle(run).save_adapter("test").read_bytes()
    run.writer = evolve(run.writer, saver=LossySaver("fp32"))
    with pytest.raises(OutputError, match=r"test.safetensors was not read back as it was written: \S+ differs"):
        RunHandle(run).save_adapter("test")
    assert [path.read_bytes() for path in run.config.output.dir.iterdir()] == [before]


def test_a_state_saved_twice_at_a_step(make_config: MakeConfig) -> None:
    """The second takes the place of the first, and nothing else is left."""
    config = make_config()
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    state = state_at(run, 3)
    for parameter in run.network.parameters_of("unet"):
        torch.nn.init.ones_(parameter)
    assert state_at(run, 3) == state
    assert list(state.parent.iterdir()) == [state]
    tensors = read_state(state, torch.device("cpu")).tensors
    assert all(torch.equal(tensors[key], tensor) for key, tensor in run.network.adapter_state().items())


@pytest.mark.parametrize(("epochs", "ratio", "saved"), [(5, 2, [2, 4]), (5, 9, [1, 2, 3, 4]), (3, 1, []), (4, 2, [2])])
def test_saves_by_ratio(epochs: int, ratio: int, saved: list[int], make_config: MakeConfig, catalog: Catalog) -> None:
    """`save_n_epoch_ratio` saves after every ⌊epochs / ratio⌋ epochs, at least one; the last is the final file."""
    config = make_config(output={"save_n_epoch_ratio": ratio}, training={"max_epochs": epochs})
    handle = RunHandle(build_run(prepare(config), Distributed(torch.device("cpu"))))
    add_observers(handle, catalog)
    for epoch in range(1, epochs + 1):
        handle.tell("epoch_finished", epoch)
    assert names(config.output.dir, "*.safetensors") == [f"test-{epoch:06d}.safetensors" for epoch in saved]


def test_saves_that_a_resumed_run_keeps(make_config: MakeConfig) -> None:
    """A run that was stopped leaves the files that it would have left without the stop, and what is not its own."""
    output = {"save_every_n_steps": 1, "save_every_n_epochs": 1, "keep_last": 3, "save_state_at_end": True}
    stopped, config = (make_config(output=output, training={"max_steps": steps}) for steps in (4, 6))
    foreign = config.output.dir / "test-step00000009.safetensors"
    foreign.parent.mkdir()
    foreign.touch()
    lorakit.train(stopped)
    assert [name[5:-12] for name in names(foreign.parent, "test-*.safetensors")] == [
        *(f"step{step:08d}" for step in (1, 2, 3, 9))
    ]
    lorakit.train(config, resume=foreign.parent / "test-state" / "step00000004")
    assert [name[5:-12] for name in names(foreign.parent, "test-*.safetensors")] == [
        *(f"step{step:08d}" for step in (2, 3, 5, 9))
    ]


@pytest.mark.parametrize(
    ("output", "key"),
    [
        ({"keep_last": 1}, "output.keep_last"),
        ({"save_n_epoch_ratio": 2, "save_every_n_epochs": 1}, "output.save_every_n_epochs"),
        ({"save_state": True, "save_state_at_end": True}, "output.save_state_at_end"),
        ({"keep_last_states": 2, "save_state_at_end": True}, "output.keep_last_states"),
        ({"save_n_epoch_ratio": 2, "keep_last": 1, "save_state": True, "keep_last_states": 2}, None),
    ],
)
def test_keys_without_effect(output: dict[str, Any], key: str | None, make_config: MakeConfig) -> None:
    """A key of [output] that others leave without effect is told."""
    warnings = [warning.key for warning in make_config(output=output).warnings()]
    assert warnings == ([key] if key else [])


def test_a_run_that_has_ended_is_not_resumed(
    make_config: MakeConfig, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    """The state of a stop on the way trains nothing again once the run has ended, unless the run is made longer.

    A run that starts again, and one whose file is gone, can be resumed.
    """
    config = make_config()
    state = state_at(build_run(prepare(config), Distributed(torch.device("cpu"))), 3)
    path = run_training(prepare(config), catalog, state)
    written = path.stat().st_mtime_ns
    assert run_training(prepare(config), catalog, "latest") == path
    assert path.stat().st_mtime_ns == written
    assert f"this run has ended already, after all of its 6 steps: {path}" in caplog.text
    longer = make_config(training={"max_steps": 7})
    assert run_training(prepare(longer), catalog, "latest").stat().st_mtime_ns > written
    path.unlink()
    assert run_training(prepare(config), catalog, "latest").exists()
    forget_end(state.parent)
    written = path.stat().st_mtime_ns
    assert run_training(prepare(config), catalog, "latest").stat().st_mtime_ns > written
