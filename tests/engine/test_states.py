"""Which states and saves a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit.engine.assembly import assemble, build_observers
from lorakit.engine.preparation import prepare
from lorakit.engine.processes import Processes
from lorakit.engine.run import Run
from lorakit.engine.state import NEUTRAL_KEYS, NEUTRAL_SECTIONS, config_key, find_state
from lorakit.errors import ConfigError
from lorakit.plugins import Catalog
from tests.engine.conftest import MakeConfig


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
    run = assemble(prepare(config), Processes(torch.device("cpu")))
    later = _state(run, 500)
    run.config = other
    first, second = _state(run, 3), _state(run, 4)
    assert [state.exists() for state in (later, first, second)] == [True, False, True]
    assert find_state(config, None) == later
    assert find_state(other, None) == second


def _state(run: Run, step: int) -> Path:
    run.step = step
    return run.save_state()


def test_what_a_state_does_not_depend_on(make_config: MakeConfig) -> None:
    """A state is taken up though the file is to say something else, and is saved in another way."""
    changed = make_config(
        metadata={"title": "other", "minimal": True},
        output={"save_n_epoch_ratio": 2, "save_state_at_end": True, "keep_last_states": 3},
        training={"process_timeout": 5, "gradient_checkpointing": 0.5, "compile": True, "compile_backend": "eager"},
        attention={"name": "eager"},
        observers=[{"name": "validation", "every_n_steps": 1}],
    )
    assert config_key(changed) == config_key(make_config())


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"weighted_captions": True}},
        {"data": {"validation_split": 0.25}},
        {"data": {"random_crop": True}},
        {"training": {"fp8_base": ["unet"]}},
        {"training": {"nf4_base": ["unet"]}},
        {"training": {"mixed_precision": "bf16"}},
        {"training": {"gradient_accumulation_steps": 2}},
        {"network": {"scale_weight_norms": 1.0}},
        {"loss": {"min_timestep": 1}},
    ],
)
def test_what_a_state_depends_on(sections: dict[str, Any], make_config: MakeConfig) -> None:
    """A state is not taken up where something is trained otherwise."""
    assert config_key(make_config(**sections)) != config_key(make_config())


def test_neutral_keys_are_keys(make_config: MakeConfig) -> None:
    """All that a state does not depend on can be set."""
    config = make_config()
    assert all(hasattr(config, section) for section in NEUTRAL_SECTIONS)
    assert all(hasattr(getattr(config, section), key) for section, keys in NEUTRAL_KEYS.items() for key in keys)


def test_resumed_with_what_does_not_count_changed(make_config: MakeConfig) -> None:
    """A run that goes on recomputing activations, with another attention and observers, ends as if unchanged.

    But for rounding, of which another attention makes a little.
    """
    sections = {"network": {"dropout": 0.1}, "data": {"validation_split": 0.25}}
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
    state = _state(assemble(prepare(config), Processes(torch.device("cpu"))), 3)
    (state / "state.json").write_text(content)
    for asked in (state, None):
        with pytest.raises(ConfigError, match=r"step00000003 is damaged"):
            find_state(config, asked)


@pytest.mark.parametrize(("epochs", "ratio", "saved"), [(5, 2, [2, 4]), (5, 9, [1, 2, 3, 4]), (3, 1, []), (4, 2, [2])])
def test_saves_by_ratio(epochs: int, ratio: int, saved: list[int], make_config: MakeConfig, catalog: Catalog) -> None:
    """`save_n_epoch_ratio` saves after every ⌊epochs / ratio⌋ epochs, at least one; the last is the final file."""
    config = make_config(output={"save_n_epoch_ratio": ratio}, training={"max_epochs": epochs})
    run = assemble(prepare(config), Processes(torch.device("cpu")))
    observers = build_observers(run, catalog)
    for epoch in range(1, epochs + 1):
        observers.tell("epoch_finished", epoch)
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
