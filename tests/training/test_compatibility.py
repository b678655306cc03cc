"""Which runs take up a state, and what is said to the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError
from lorakit.training.checkpoint.compatibility import NEUTRAL_KEYS, NEUTRAL_SECTIONS, RunFingerprint, fast_forward
from lorakit.training.checkpoint.state import find_state
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.precision import common_precision, with_precision
from lorakit.training.setup import build_run
from tests.training.conftest import MakeConfig


def identity(config: TrainConfig, processes: int = 1) -> RunFingerprint:
    """What tells a run of a config from others."""
    chosen = with_precision(config, common_precision(config.training, Distributed(torch.device("cpu"))))
    return RunFingerprint.of(prepare(chosen), processes)


def refusals(before: RunFingerprint, now: RunFingerprint) -> list[str]:
    """What is said when a run takes up the state of another, after that went through a file."""
    return [str(problem) for problem in now.problems_with(json.loads(json.dumps(before.to_dict())))]


def state_at(run: Run, step: int) -> Path:
    """The state of a run as if it had come to a step."""
    run.step = step
    return RunHandle(run).save_state()


def saved_state(config: TrainConfig, step: int = 3) -> Path:
    """The state of a run that has come to a step, as far as its numbers go."""
    return state_at(build_run(prepare(config), Distributed(torch.device("cpu"))), step)


def redescribe(state: Path, **changes: Any) -> None:
    """Change what a state says of itself; None takes a key out."""
    description = {**json.loads((state / "state.json").read_text()), **changes}
    kept = {key: value for key, value in description.items() if value is not None}
    (state / "state.json").write_text(json.dumps(kept))


def test_what_a_state_does_not_depend_on(make_config: MakeConfig) -> None:
    """A state is taken up though the file is to say something else, and is saved in another way."""
    changed = make_config(
        metadata={"title": "other", "minimal": True},
        output={"save_n_epoch_ratio": 2, "save_state_at_end": True, "keep_last_states": 3},
        training={"process_timeout": 5, "gradient_checkpointing": 0.5, "compile": True, "compile_backend": "eager"},
        attention={"name": "eager"},
        observers=[{"name": "validation", "every_n_steps": 1}],
    )
    assert refusals(identity(make_config()), identity(changed)) == []


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
    ((section, table),) = sections.items()
    ((key, _),) = table.items()
    (refusal, *_) = refusals(identity(make_config()), identity(make_config(**sections)))
    assert refusal.startswith(f"{section}.{key}: ")
    assert refusals(identity(make_config(**sections)), identity(make_config()))


def test_another_precision(make_config: MakeConfig) -> None:
    """A run does not go on in a precision that `"auto"` chooses on another machine; how to go on is said."""
    before, now = (identity(make_config(training={"mixed_precision": value})) for value in ("bf16", "auto"))
    assert refusals(before, now) == [
        'training.mixed_precision: "bf16" in the state, "no" in this run (set it to "bf16")'
    ]
    assert refusals(now, identity(make_config(training={"mixed_precision": "no"}))) == []


def test_neutral_keys_are_keys(make_config: MakeConfig) -> None:
    """All that a state does not depend on can be set."""
    config = make_config()
    assert all(hasattr(config, section) for section in NEUTRAL_SECTIONS)
    assert all(hasattr(getattr(config, section), key) for section, keys in NEUTRAL_KEYS.items() for key in keys)


def test_all_that_differs_is_said(make_config: MakeConfig) -> None:
    """Another config is refused with each key, its value there and here, and the way on from the weights."""
    state = saved_state(make_config())
    changed = make_config(
        training={"seed": 43}, optimizer={"name": "lion"}, network={"rank": 8}, data={"flip_aug": True}
    )
    with pytest.raises(ConfigError) as caught:
        find_state(identity(changed), None)
    told = str(caught.value).splitlines()
    assert str(state) in told[0]
    assert told[-1].endswith(f'network.weights = "{state / "network.safetensors"}"')
    for line in (
        "  data.flip_aug: false in the state, true in the config",
        "  network.rank: 4 in the state, 8 in the config",
        '  optimizer.name: "adamw" in the state, "lion" in the config',
        "  training.seed: 42 in the state, 43 in the config",
    ):
        assert line in told
    assert not any("max_steps" in line for line in told)


def test_keys_of_several_datasets(tables: dict[str, Any], make_config: MakeConfig) -> None:
    """Where there are several datasets, a key says which it is of."""
    folder = tables["data"].pop("image_dir")
    size = tables["data"].pop("resolution")

    def config(repeats: int, count: int = 2) -> TrainConfig:
        datasets = [
            {"resolution": size, "subsets": [{"image_dir": folder, "num_repeats": number}]}
            for number in [1, repeats, 1][:count]
        ]
        return make_config(data={"datasets": datasets})

    told = refusals(identity(config(2)), identity(config(3)))
    assert told[0] == "data.datasets[1].num_repeats: 2 in the state, 3 in the config"
    told = refusals(identity(config(2)), identity(config(2, count=3)))
    assert told[0] == 'data.datasets: "2 tables" in the state, "3 tables" in the config'


def test_keys_that_are_newer_than_a_state(make_config: MakeConfig) -> None:
    """A key that did not exist when a state was saved counts as its default; one that is no longer there differs."""
    state = saved_state(make_config())
    config = json.loads((state / "state.json").read_text())["config"]
    del config["training"]["max_grad_norm"], config["loss"]
    redescribe(state, config=config)
    assert find_state(identity(make_config()), None) == state
    with pytest.raises(ConfigError, match=r"max_grad_norm: 1\.0 in the state, 0\.5 in the config"):
        find_state(identity(make_config(training={"max_grad_norm": 0.5})), None)
    config["training"]["warp"] = 9
    redescribe(state, config=config)
    with pytest.raises(ConfigError, match=r"training\.warp: 9 in the state, absent in the config"):
        find_state(identity(make_config()), None)


def test_states_of_other_versions(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Another format is refused with the version that reads it; another version of the same format is warned of."""
    state = saved_state(make_config())
    redescribe(state, lorakit="0.0.9")
    assert find_state(identity(make_config()), None) == state
    assert "saved by lorakit 0.0.9, this is" in caplog.text
    for number in (None, 1, 99):
        redescribe(state, format=number)
        with pytest.raises(ConfigError, match=rf"has format {number or 1}, of lorakit 0\.0\.9; this lorakit reads"):
            find_state(identity(make_config()), None)


def test_a_changed_dataset_is_refused(make_config: MakeConfig, photographs: Path, tmp_path: Path) -> None:
    """Images that are new, gone or changed in any way that is trained are named."""
    folder = shutil.copytree(photographs, tmp_path / "photos")
    config = make_config(data={"image_dir": str(folder)})
    state, (first, second, *_) = saved_state(config), sorted(folder.glob("*.png"))
    assert find_state(identity(config), None) == state
    caption = first.with_suffix(".txt")
    was = caption.read_text()
    caption.write_text("something else")
    with pytest.raises(ConfigError, match=rf"data: other content, size, caption.* than in the state: {first.name}\n"):
        find_state(identity(config), None)
    caption.write_text(was)
    find_state(identity(config), None)
    shutil.copy(first, second)
    with pytest.raises(ConfigError, match=rf"data: other content.*: {second.name}\n"):
        find_state(identity(config), None)
    second.rename(folder / "zebra.png")
    with pytest.raises(ConfigError, match=rf"data: 4 images in the state, 4 now; new: zebra.png; gone: {second.name}"):
        find_state(identity(config), None)


def test_another_number_of_processes(make_config: MakeConfig) -> None:
    """It is all one as long as all together train on as many images at once; if not, the right batch size is said."""
    one, two = identity(make_config(data={"batch_size": 2})), identity(make_config(), processes=2)
    assert refusals(one, two) == refusals(two, one) == []
    (told,) = refusals(two, identity(make_config()))
    assert told.startswith("data.batch_size: 2 in the state, 1 in the config, counting the images of all processes: 2 ")
    assert told.endswith("(set it to 2 for this number of processes)")
    (told,) = refusals(one, identity(make_config(), processes=3))
    assert "set it to" not in told


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"name": "cosine", "warmup_steps": 1}, "learning rates depend"),
        ({"name": "constant_with_warmup", "warmup_steps": 0.5}, "learning rates depend"),
        ({"name": "constant_with_warmup", "warmup_steps": 2}, ""),
        ({"name": "torch.optim.lr_scheduler.ExponentialLR", "args": {"gamma": 0.5}}, ""),
    ],
)
def test_schedules_of_a_longer_run(
    schedule: dict[str, Any], told: str, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that has become longer goes on with the rates of the longer one; it says where those done differ."""
    short, long = (make_config(lr_scheduler=schedule, training={"max_steps": steps}) for steps in (6, 12))
    stopped, whole, resumed = (build_run(prepare(own), Distributed(torch.device("cpu"))) for own in (short, long, long))
    for run in (stopped, whole):
        fast_forward(run.lr_scheduler, rates(run), 4)
    RunHandle(resumed).load_state(state_at(stopped, 4))
    for _ in range(8):
        assert rates(resumed) == rates(whole)
        for run in (resumed, whole):
            run.lr_scheduler.step()
    assert (told in caplog.text) if told else not caplog.text


def rates(run: Run) -> list[float]:
    """The learning rates of the next step."""
    return [group["lr"] for group in run.optimizer.param_groups]


def test_a_run_that_is_shorter_than_a_state(make_config: MakeConfig) -> None:
    """It is refused, with the key that says how long it is."""
    state = saved_state(make_config(), 5)
    run = build_run(prepare(make_config(training={"max_steps": 4})), Distributed(torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"training\.max_steps: gives 4 steps, .* has reached step 5"):
        RunHandle(run).load_state(state)


def test_a_state_that_does_not_fit(make_config: MakeConfig) -> None:
    """Whole files whose content is not of this run are a message that names the state."""
    state = saved_state(make_config())
    run = build_run(prepare(make_config(network={"rank": 8})), Distributed(torch.device("cpu")))
    with pytest.raises(ConfigError, match="step00000003 is damaged: AdapterError"):
        RunHandle(run).load_state(state)
